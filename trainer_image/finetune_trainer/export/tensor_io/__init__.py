"""Tensors between files and a device, read ahead and written behind the computation.

tensor_reader.py      tensors of a checkpoint, read ahead
file_writer.py        files that threads write while the caller computes
staging.py            the threads and their pinned buffers
staged_reader.py      tensors that callers' own threads read, each when it is asked for
buffers.py            memory that is read into, reused
safetensors_files.py  the safetensors format, one tensor at a time
checked_tensors.py    safetensors files that tell damage by checksums
stopwatch.py          time that a device spends
"""
