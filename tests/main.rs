//! All integration tests in one binary, so that it links once.

mod crash;
mod create;
mod image;
mod layering;
mod support;
mod tables;
