"""A registered model at work: what the server, the command line and the flow share. Knows no HTTP."""
