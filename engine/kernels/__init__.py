"""The hot loops on packed numbers: one function, one signature, in plain torch, in C and in Triton."""
