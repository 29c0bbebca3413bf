"""What `sora doctor` checks: one function per check, each returning one `Check`."""
