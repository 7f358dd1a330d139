"""Turns kopf's events into jobs that are due, and reconciles them.

`handlers`    kopf's handlers and settings; every event becomes a trigger
`controller`  tracks known jobs and hands those that are due to workers
`work_queue`  keys with due times in two lanes, each worked on by one worker at a time
"""
