//! All integration tests in one binary, so that it links once.

mod check;
mod crash;
mod create;
mod devices;
mod foreign;
mod image;
mod inspection;
mod layering;
mod locks;
mod qemu;
mod support;
mod tables;
