"""The S3 server of tests and demo does over HTTP what commits rely on."""

import pytest
from botocore.exceptions import ClientError

from finetune_test_servers.s3_server import S3Server


def test_conditional_writes_and_multipart_uploads_work(s3_server: S3Server) -> None:
    s3_server.create_bucket("probe-bucket")
    s3 = s3_server.client()
    s3.put_object(Bucket="probe-bucket", Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError) as refusal:
        s3.put_object(Bucket="probe-bucket", Key="once", Body=b"2", IfNoneMatch="*")
    assert refusal.value.response["Error"]["Code"] == "PreconditionFailed"
    upload = s3.create_multipart_upload(Bucket="probe-bucket", Key="parts")["UploadId"]
    where = {"Bucket": "probe-bucket", "Key": "parts", "UploadId": upload}
    parts = []
    for number, body in enumerate((b"a" * 5_242_880, b"b"), start=1):
        tag = s3.upload_part(**where, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert s3.head_object(Bucket="probe-bucket", Key="parts")["ContentLength"] == 5_242_881
