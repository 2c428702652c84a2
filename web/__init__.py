"""The HTTP face and the page: one more client of the server, in a process of its own (`seqserve web`)."""
