"""Reading and writing of files: atomic replacement, strict parsing, ownership marks and the lock of an output."""
