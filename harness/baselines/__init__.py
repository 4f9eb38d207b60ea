"""Other systems that run models larger than memory, each behind one face and in a process of its own.

One file per system (`face.Baseline` is the face, `registry` the list). A file is imported on both sides:
here, where only its facts are read, and in the child, whose Python is the system's own environment and
holds none of our packages. So these modules import the standard library at their top, and what a system
needs inside its methods. Nothing here knows HELM, text or how results are compared.
"""
