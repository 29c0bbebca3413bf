"""What `sora doctor` looks at: a function a check, each returning one `Check`."""
