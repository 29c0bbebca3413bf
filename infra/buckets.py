"""Makes the buckets that are named as arguments, where they are not there yet. AWS_* variables say where and who."""

from __future__ import annotations

import sys

import boto3


def main() -> None:
    client = boto3.client("s3")
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in sys.argv[1:]:
        if name not in there:
            client.create_bucket(Bucket=name)


if __name__ == "__main__":
    main()
