//! Regression tests for faults of snapshot sets in real environments: several directories, several
//! VMs, links, devices, foreign owners, damaged files and interrupted operations. Each test drives
//! the program and compares the files.

mod attributes;
mod cancel;
mod dependents;
mod devices;
mod identity;
mod journal;
mod live;
mod names;
mod obstacles;
mod program;
mod recovery;
mod removal;
mod uncertain;
mod volumes;
mod world;
mod wrong_file;
