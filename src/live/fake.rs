//! A hypervisor for tests: a VM whose disks are real images, and which plays the turns that it is told to.
