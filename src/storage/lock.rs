//! QEMU's image locks: open-file-description byte locks, as its `file-posix` driver takes them.

/// One of QEMU's permissions; byte 100 + i says "I use it", byte 200 + i says "I do not share it".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Consistent reads.
    ConsistentRead = 0,
    /// Writes that change content.
    Write = 1,
    /// Writes that do not change content.
    WriteUnchanged = 2,
    /// Changes of length.
    Resize = 3,
}

/// Which locks a handle takes before it reads anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum LockMode {
    /// None, as with `qemu-img -U` or `locking=off`: for looking at an image whose owner is gone.
    None,
    /// What QEMU takes on a read-only image and on every backing file: uses consistent reads, shares no writes.
    #[default]
    Read,
    /// What QEMU takes on a disk in use: uses consistent reads, writes and resize, shares no writes.
    Write,
}
