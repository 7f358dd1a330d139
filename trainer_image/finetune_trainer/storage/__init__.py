"""Storage under sources and artifacts: S3 and local folders, with retries and digests. Imports nothing of the trainer.

object_store     the operations that results and checkpoints need, as a protocol
s3_store         a job's prefix in an S3 bucket
folder_store     the same in a local folder, for `finetune run`
s3_session       one S3 client; every request goes through it and is retried
s3_faults        botocore's errors, sorted by what can be done about them
endpoint_checks  where a connection leads, checked when it is opened
s3_credentials   keys from a mounted Secret, read again when it changes
s3_upload        upload of one file in parallel parts, with proof that the store holds it
s3_download      download of one object in parallel ranges
moving_bytes     bodies of requests that are sent and received in pieces, each a sign of life
s3_probe         a test before training: can the output be written, and what does the store check
disk_faults      errors of a disk that is full or must not be written
retry            retries with exponential backoff, for S3 and the Hugging Face Hub
sizes            sizes in bytes, as people read them
digests          SHA-256 and CRC64-NVME of files and folders
"""
