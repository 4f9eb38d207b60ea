"""Other systems that run models larger than memory, all behind one interface, each in a process of its own.

There is one file per system in `systems`; `base.Baseline` is the interface and `registry` the list. A file
is imported by the parent, which reads its attributes only, and by the child process, whose Python is the
system's own environment and has none of our packages. So these modules import only the standard library at
the top, and what the system needs inside its methods. Nothing here knows HELM, text or how results are
compared.
"""
