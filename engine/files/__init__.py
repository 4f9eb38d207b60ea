"""Files and folders on somebody's disk: written whole, marked, named; documents read within limits."""
