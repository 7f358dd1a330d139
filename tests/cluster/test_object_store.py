"""The S3 server of tests and demo does over HTTP what commits rely on."""

import pytest
from botocore.exceptions import ClientError

from finetune_test_servers.object_store import ObjectStore


def test_conditional_writes_and_multipart_uploads_work(object_store: ObjectStore) -> None:
    object_store.create_bucket("probe-bucket")
    s3 = object_store.client()
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
