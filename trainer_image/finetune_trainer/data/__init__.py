"""Data: files to rows, and rows to conversations or texts, streamed in bounded memory.

rows.py            rows of any data file, each with its location; the room's front door
data_files.py      files as byte streams, unpacked within limits
json_rows.py       rows of JSON Lines and JSON files
csv_rows.py        rows of CSV and TSV files
arrow_rows.py      rows of Parquet and Arrow files
layouts.py         a row's layout, and the conversation or text in it (pure)
messages.py        one schema for messages of every layout (pure)
media.py           rows with images, sound or videos, which are refused (pure)
tools.py           tools, and calls compared with them (pure)
strict_json.py     JSON that refuses what would be silently wrong (pure)
truncation.py      long texts truncated while they are bytes, for preflight (pure)
csv_truncation.py  the same for fields of CSV
arrow_bounds.py    the size that an Arrow batch unpacks to (pure)
length_grouping.py  rows ordered so that padded batches need little padding (pure)
report_limits.py   how many rows and findings each report names
"""
