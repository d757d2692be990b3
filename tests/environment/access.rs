//! Owners, modes and attributes of images, and programs that hold images open.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use super::program::{give, tool};

/// The user and group of a hypervisor that does not run as root (Debian's `libvirt-qemu`).
pub const HYPERVISOR: (u32, u32) = (64055, 108);

/// An ACL that lets one more user (1000) read and write: version 2, and for each entry its tag, its
/// permissions and its user, in little-endian order.
const ACL: &str = "0x02000000\
                   01000600ffffffff\
                   02000600e8030000\
                   04000000ffffffff\
                   10000600ffffffff\
                   20000000ffffffff";

/// The owner of the images of a world, and the user of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The user of the test; mode 0644.
    Own,
    /// The hypervisor's user; mode 0600.
    Owned,
    /// The hypervisor's user; mode 0640.
    OwnedByGroup,
    /// An extended attribute beside another owner.
    Attribute,
    /// A POSIX ACL beside another owner.
    Acl,
    /// A security label beside another owner, as SELinux and libvirt set it.
    Label,
    /// The program itself runs as the hypervisor's user, in directories of that user.
    OtherUser,
}

pub const ACCESSES: [Access; 7] = [
    Access::Own,
    Access::Owned,
    Access::OwnedByGroup,
    Access::Attribute,
    Access::Acl,
    Access::Label,
    Access::OtherUser,
];

impl Access {
    /// The name in the table of results.
    pub fn label(self) -> &'static str {
        match self {
            Self::Own => "access: own",
            Self::Owned => "access: 64055 0600",
            Self::OwnedByGroup => "access: 64055:108 0640",
            Self::Attribute => "access: attribute",
            Self::Acl => "access: ACL",
            Self::Label => "access: label",
            Self::OtherUser => "access: other user",
        }
    }

    /// Gives an image its owner, mode and attributes.
    pub fn apply(self, image: &Path) {
        match self {
            Self::Own => {}
            Self::Owned | Self::OtherUser => give(image, HYPERVISOR, 0o600),
            Self::OwnedByGroup => give(image, HYPERVISOR, 0o640),
            Self::Attribute | Self::Acl | Self::Label => {
                give(image, HYPERVISOR, 0o660);
                self.set_attribute(image);
                assert!(self.read_attribute(image).is_some(), "{}: {}", self.label(), image.display());
            }
        }
    }

    /// The user and group that the program runs as, if not those of the test.
    pub fn user(self) -> Option<(u32, u32)> {
        (self == Self::OtherUser).then_some(HYPERVISOR)
    }

    /// The extended attribute that keeps this kind of access, and its value for `setfattr`.
    fn attribute(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Attribute => Some(("user.qcow2-chain-test", "kept")),
            Self::Acl => Some(("system.posix_acl_access", ACL)),
            Self::Label => Some(("security.selinux", "system_u:object_r:svirt_image_t:s0:c107,c582")),
            Self::Own | Self::Owned | Self::OwnedByGroup | Self::OtherUser => None,
        }
    }

    fn set_attribute(self, image: &Path) {
        let Some((name, value)) = self.attribute() else { return };
        let args = ["-n", name, "-v", value].map(OsStr::new);
        let _ = tool("setfattr", &[&args[..], &[image.as_os_str()]].concat());
    }

    /// Reads the value of the attribute of an image; `None` where there is none, or no tool to read
    /// it.
    pub fn read_attribute(self, image: &Path) -> Option<String> {
        let (name, _) = self.attribute()?;
        let args = ["--encoding=hex", "--absolute-names", "-n", name].map(OsStr::new);
        let said = tool("getfattr", &[&args[..], &[image.as_os_str()]].concat())?;
        // The path comes first.
        Some(said.lines().find(|line| line.starts_with(name))?.to_owned())
    }

    /// Returns `true` if images in `directory` can have this kind of access, as far as attributes
    /// decide.
    pub fn is_possible(self, directory: &Path) -> bool {
        if self.attribute().is_none() {
            return true;
        }
        let probe = directory.join("attribute-probe");
        std::fs::write(&probe, b"").expect("a file for a probe");
        self.set_attribute(&probe);
        let kept = self.read_attribute(&probe).is_some();
        std::fs::remove_file(&probe).expect("the probe is removed");
        kept
    }
}

/// A `qemu-io` that has an image open until the value is dropped.
pub struct Holder {
    pub path: PathBuf,
    pub writes: bool,
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    /// Opens an image for reading or for writing and returns when the locks are held; `None` if
    /// QEMU cannot open it.
    pub fn open(path: &Path, format: &str, writes: bool) -> Option<Self> {
        let mut command = Command::new("qemu-io");
        command.args(if writes { &[][..] } else { &["-r"] }).args(["-f", format]).arg(path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let asked = stdin.write_all(b"read 0 512\n").and_then(|()| stdin.flush());
        let mut line = String::new();
        // A read is answered only after the image is open.
        while asked.is_ok() && !line.contains("read 512/512") {
            line.clear();
            if stdout.read_line(&mut line).map_or(0, |len| len) == 0 {
                break;
            }
        }
        let holder = Self { path: path.to_owned(), writes, child, stdin: Some(stdin) };
        line.contains("read 512/512").then_some(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // At the end of its input it closes the image and ends.
        self.stdin = None;
        let _ = self.child.wait();
    }
}
