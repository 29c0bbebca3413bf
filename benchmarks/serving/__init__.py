"""The server under load, beside the same work without a server and beside other servers."""
