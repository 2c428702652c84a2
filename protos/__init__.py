"""What goes over the wire: the .proto files and their generated stubs, committed and checked (`python -m protos --check`)."""
