"""What `make docs` adds to MkDocs: the help of every command, pages from outside docs/, docstrings as lists."""
