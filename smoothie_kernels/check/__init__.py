"""What a user runs to know that the kernels are right on a machine: `smoothie-kernels check`."""
