//! All integration tests in one binary, so that it links once.

mod layering;
mod crash;
mod image;
mod support;
