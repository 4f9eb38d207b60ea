"""Files and folders of ours on somebody's disk: written whole, marked, named; nothing of what they hold."""
