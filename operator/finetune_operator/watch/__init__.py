"""From kopf's events to jobs that are reconciled.

handlers.py    kopf's handlers and settings; every event becomes a trigger
controller.py  tracks known jobs and hands those that are due to workers
work_queue.py  keys with due times, each worked on by one worker at a time
"""
