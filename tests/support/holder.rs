//! A program that has an image open.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

/// A `qemu-io` that has an image open until this is dropped.
pub struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    /// Opens an image and returns when the locks are held.
    pub fn open(image: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(options)
            .args(["-f", "qcow2"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        stdin.write_all(b"read 0 512\n").expect("qemu-io listens");
        // A read is answered only after the image is open.
        let mut line = String::new();
        while !line.contains("read 512/512") {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).expect("qemu-io answers"), 0, "qemu-io ended");
        }
        Self { child, stdin: Some(stdin) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // At the end of its input it closes the image and ends.
        self.stdin = None;
        let _ = self.child.wait();
    }
}
