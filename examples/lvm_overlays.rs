//! Snapshots of a VM on logical volumes: the disk is a raw logical volume, and each overlay is one too.
//!
//! ```text
//! cargo run --example lvm_overlays
//! ```
//! The example needs root and the packages `lvm2` and `util-linux`. Without them it prints the reason and exits with 0.
//! It creates a file in a temporary directory, a loop device over it and a volume group on that device, and removes all
//! three at the end, also after an error. LVM is restricted to that loop device by a filter, so that no other volume
//! group of the machine is read or changed. After a signal, `vgremove` and `losetup --detach` are left to the user.
//!
//! # How overlays get onto logical volumes
//! By default an overlay is a file beside the active file. A directory of devices is no place for files, so that a
//! volume on a device needs either a directory (`overlay_dir`) or an [`OverlayProvider`], which hands out containers.
//! [`LogicalVolumes`] is such a provider. The library never starts a program; the provider may.
//!
//! A logical volume does not grow by itself. Each one gets the space of an overlay of which every cluster is written
//! ([`OverlayRequest::full_size`]), so that neither the guest nor a merge runs out of space. A thin pool serves as well:
//! use `lvcreate --thin --virtualsize`, and monitor the pool. If it is full in the middle of a merge, the operation
//! fails, and [`SnapshotSet::recover`] completes it once the pool was extended.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, ChainOptions, Format, Policy};
use qcow2_chain::format::GuestOffset;
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{self, Access, FileStorage, Storage};
use qcow2_chain::vm::{
    self, AdoptOptions, MergeOptions, OverlayProvider, OverlayRequest, Report, SnapshotSet, VolumeSpec,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
/// The virtual size of the disk, in bytes.
const DISK: u64 = 16 * MIB;
/// The size of the volume group, in bytes: the disk, four full overlays, and LVM's metadata.
const GROUP: u64 = 96 * MIB;
/// The limit of LVM for the names of a group and a volume together, in bytes. A hyphen counts twice.
const MAX_LVM_NAME: usize = 127;

fn main() -> Result<()> {
    if let Some(reason) = reason_to_skip() {
        println!("This example does nothing here: {reason}.");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let group = Arc::new(Group::new(directory.path())?);
    story(directory.path(), &group)
    // The group is removed here, then the loop device, then the directory.
}

/// Returns the reason why no logical volume can be created here, if there is one.
fn reason_to_skip() -> Option<&'static str> {
    if run("id", &["-u"]).ok()?.trim() != "0" {
        return Some("root is needed");
    }
    if run("lvm", &["version"]).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Some("lvm2 is not installed");
    }
    if run("dmsetup", &["version"]).is_err() {
        return Some("the kernel has no device mapper");
    }
    run("losetup", &["--find"]).is_err().then_some("no loop device is available")
}

fn story(directory: &Path, group: &Arc<Group>) -> Result<()> {
    // Extents of a deleted logical volume keep their content, and LVM hands them out again. The overlays of this example
    // are created on such extents: stale bytes must not appear in any of them.
    group.fill_free_space(0xff)?;
    group.create_volume("vda", DISK)?;

    let mut vm = Vm::new(directory, group)?;
    println!("A VM with a raw disk of {} MiB on {}\n", DISK / MIB, vm.set.active_path("vda")?.display());
    for name in ["s1", "s2", "s3"] {
        vm.snapshot(name)?;
    }
    // s2 and s3 are two overlays, one on the other. A commit writes the upper one into the lower one.
    vm.delete("s2", Direction::Commit)?;
    // The overlay of s3 lies between the disk and the active overlay. A pull reads it into the active one.
    vm.delete("s3", Direction::Pull)?;
    vm.revert("s1")?;
    // The last overlay goes back into the raw logical volume that the VM began with.
    vm.delete("s1", Direction::Commit)?;
    println!("The VM writes {} again, and no other logical volume is left.", vm.set.active_path("vda")?.display());
    println!("Every content was as expected, {} of them.", vm.compared);
    Ok(())
}

/// A provider that creates each overlay on a logical volume of its own.
#[derive(Debug)]
struct LogicalVolumes {
    group: Arc<Group>,
}

impl OverlayProvider for LogicalVolumes {
    /// Returns `/dev/GROUP/NAME`. The name of the request has a random part, so that no other VM has a volume of this
    /// name. The node `/dev/dm-N` behind this link would be the wrong answer: its number may be that of another volume
    /// after a restart.
    fn path(&self, request: &OverlayRequest<'_>) -> vm::Result<PathBuf> {
        let (group, name) = (&self.group.name, request.name);
        let length = |text: &str| text.len() + text.matches('-').count();
        let allowed = name.chars().all(|c| c.is_ascii_alphanumeric() || "+_.-".contains(c)) && !name.starts_with('-');
        if !allowed || length(group) + length(name) >= MAX_LVM_NAME {
            let why = "LVM does not allow this name; choose another name for the VM or the volume".to_owned();
            return Err(storage::Error::Refused { name: format!("{group}/{name}"), why }.into());
        }
        Ok(Path::new("/dev").join(group).join(name))
    }

    /// Creates the logical volume. LVM refuses a name that exists, and rounds the size up to whole extents.
    fn create(&self, request: &OverlayRequest<'_>) -> vm::Result<()> {
        self.group.create_volume(request.name, request.full_size).map_err(|error| failed(request.name, "create", error))
    }

    /// Removes the logical volume. LVM refuses while a program has it open. The call succeeds if the volume is missing:
    /// recovery repeats it after a crash in the middle.
    fn release(&self, path: &Path) -> vm::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let removed = self.group.volumes().and_then(|volumes| match volumes.contains(&*name) {
            true => self.group.lvm("lvremove", &["--force", &self.group.full_name(&name)]).map(drop),
            false => Ok(()),
        });
        removed.map_err(|error| failed(&name, "remove", error))
    }
}

fn failed(volume: &str, action: &str, source: io::Error) -> vm::Error {
    let action = format!("{action} the logical volume");
    storage::Error::Io { name: volume.to_owned(), action, source }.into()
}

/// The content of a disk.
type Content = Vec<u8>;

/// The VM, and the contents that are expected.
struct Vm {
    set: SnapshotSet,
    group: Arc<Group>,
    now: Content,
    taken: BTreeMap<String, Content>,
    writes: u64,
    compared: usize,
}

impl Vm {
    fn new(directory: &Path, group: &Arc<Group>) -> Result<Self> {
        let path = group.path("vda");
        // A set that is opened without its provider creates overlays as files in the directory that is named here. It
        // never touches the provider's logical volumes: a deletion reports them as released.
        let spec = VolumeSpec::new("vda", &path).with_format(Format::Raw).with_overlay_dir(directory);
        let set = SnapshotSet::adopt(directory.join("vm.json"), &[spec], &AdoptOptions::default())?;
        let set = set.with_provider(Arc::new(LogicalVolumes { group: Arc::clone(group) }));
        let mut now = vec![0; usize::try_from(DISK)?];
        FileStorage::open(&path, &Access::read())?.read_at(&mut now, 0)?;
        Ok(Self { set, group: Arc::clone(group), now, taken: BTreeMap::new(), writes: 0, compared: 0 })
    }

    fn snapshot(&mut self, name: &str) -> Result<()> {
        self.write()?;
        let report = self.set.create(name, &Default::default())?;
        self.taken.insert(name.to_owned(), self.now.clone());
        self.write()?;
        self.verify(&format!("{name} taken"), &report)
    }

    fn delete(&mut self, name: &str, direction: Direction) -> Result<()> {
        self.write()?;
        let options = MergeOptions::default().with_direction(direction);
        let report = self.set.delete(name, &options, &())?;
        self.taken.remove(name);
        self.verify(&format!("{name} deleted by {direction:?}").to_lowercase(), &report)
    }

    fn revert(&mut self, name: &str) -> Result<()> {
        self.write()?;
        let report = self.set.revert(name, &MergeOptions::default(), &())?;
        self.now.clone_from(&self.taken[name]);
        self.verify(&format!("{name} reverted to"), &report)
    }

    /// Writes as the guest does: through the chain that the headers describe, at odd offsets.
    fn write(&mut self) -> Result<()> {
        let options = ChainOptions::default().with_policy(Policy::Any).with_writable(1);
        let active = &self.set.model()?.volumes[0].active.file;
        let chain = Chain::open(self.set.active_path("vda")?, &options.with_format(active.format))?;
        for part in 0..8 {
            self.writes += 1;
            let at = (self.writes * 7_654_321 + part * 500_011) % (DISK - MIB);
            let bytes = vec![u8::try_from(self.writes % 251)?; 100_000];
            chain.write_at(&bytes, GuestOffset::new(at))?;
            self.now[usize::try_from(at)?..][..bytes.len()].copy_from_slice(&bytes);
        }
        chain.close()?;
        Ok(())
    }

    /// Compares every content, and the logical volumes that exist with those that the catalogue records.
    fn verify(&mut self, done: &str, report: &Report) -> Result<()> {
        if let Some(released) = report.released.first() {
            return Err(format!("{done}: {} was not removed: {}", released.path.display(), released.reason).into());
        }
        compare(&self.set.open_active("vda")?, &self.now, "the disk")?;
        for (snapshot, content) in &self.taken {
            compare(&self.set.open(snapshot, "vda")?, content, snapshot)?;
        }
        self.compared += 1 + self.taken.len();
        let model = self.set.model()?;
        let overlays = model.records().filter(|(_, _, record)| record.provided).map(|(_, _, record)| &record.file.path);
        let overlays = overlays.filter_map(|path| path.rsplit('/').next()).map(str::to_owned);
        let expected: BTreeSet<String> = overlays.chain(["vda".to_owned()]).collect();
        let volumes = self.group.volumes()?;
        if volumes != expected {
            return Err(format!("{done}: the logical volumes are {volumes:?}, recorded are {expected:?}").into());
        }
        println!("{done}: the VM writes {}", self.set.active_path("vda")?.display());
        volumes.iter().for_each(|volume| println!("  {volume}"));
        Ok(())
    }
}

fn compare(chain: &Chain, expected: &[u8], what: &str) -> Result<()> {
    let mut found = vec![0; expected.len()];
    chain.read_at(&mut found, GuestOffset::ZERO)?;
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: byte {at} is {:#04x}, expected {:#04x}", found[at], expected[at]).into()),
    }
}

/// A volume group on a loop device of its own. Both are removed at the end.
#[derive(Debug)]
struct Group {
    name: String,
    device: LoopDevice,
}

impl Group {
    fn new(directory: &Path) -> Result<Self> {
        let file = directory.join("group");
        std::fs::File::create_new(&file)?.set_len(GROUP)?;
        let group = Self { name: format!("qcow2_chain_{}", std::process::id()), device: LoopDevice::new(&file)? };
        let device = group.device.0.clone();
        group.lvm("pvcreate", &[&device])?;
        group.lvm("vgcreate", &["--physicalextentsize", "1m", &group.name, &device])?;
        Ok(group)
    }

    /// Runs an LVM command that sees the loop device and nothing else. In a container without udev, LVM creates the
    /// nodes of the volumes itself.
    fn lvm(&self, verb: &str, arguments: &[&str]) -> io::Result<String> {
        let device = &self.device.0;
        let config = format!(
            r#"devices {{ filter=["a|^{device}$|","r|.*|"] use_devicesfile=0 }} activation {{ verify_udev_operations=1 }}"#
        );
        run("lvm", &[&[verb, "--config", &config], arguments].concat())
    }

    fn full_name(&self, volume: &str) -> String {
        format!("{}/{volume}", self.name)
    }

    fn path(&self, volume: &str) -> PathBuf {
        Path::new("/dev").join(&self.name).join(volume)
    }

    /// Creates a logical volume with room for `size` bytes. Its old content is not wiped: the library does not rely on
    /// the content of a new container.
    fn create_volume(&self, name: &str, size: u64) -> io::Result<()> {
        let size = format!("{size}b");
        let wipe = ["--wipesignatures", "n", "--zero", "n"];
        self.lvm("lvcreate", &[&["--size", &size, "--name", name], &wipe[..], &[&self.name]].concat()).map(drop)
    }

    /// Returns the names of the logical volumes.
    fn volumes(&self) -> io::Result<BTreeSet<String>> {
        let listed = self.lvm("lvs", &["--noheadings", "--options", "lv_name", &self.name])?;
        Ok(listed.split_whitespace().map(str::to_owned).collect())
    }

    /// Fills the free extents of the group with a byte.
    fn fill_free_space(&self, byte: u8) -> Result<()> {
        let name = self.full_name("filler");
        self.lvm("lvcreate", &["--extents", "100%FREE", "--name", "filler", &self.name])?;
        {
            let filler = FileStorage::open(self.path("filler"), &Access::write())?;
            let (bytes, len) = (vec![byte; usize::try_from(MIB)?], filler.len()?);
            (0..len / MIB).try_for_each(|part| filler.write_at(&bytes, part * MIB))?;
            filler.sync()?;
        }
        self.lvm("lvremove", &["--force", &name])?;
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // If the group was never created, the command fails, and nothing is left to remove.
        let _ = self.lvm("vgremove", &["--force", &self.name]);
    }
}

/// A loop device, detached at the end.
#[derive(Debug)]
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path) -> io::Result<Self> {
        run("losetup", &["--find", "--show", &file.to_string_lossy()]).map(|device| Self(device.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = run("losetup", &["--detach", &self.0]) {
            eprintln!("{} is left: {error}", self.0);
        }
    }
}

/// Runs a program and returns its output.
fn run(program: &str, arguments: &[&str]) -> io::Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {}: {}", arguments.join(" "), message.trim())))
}
