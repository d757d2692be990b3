//! Access rights of new files: owner, group, permissions, ACL, extended attributes and security
//! label of a model.
//!
//! # Order
//! A new file must never be more accessible than its model, not even for an instant:
//!
//! 1. It is created with mode 0600. A default ACL of the directory is inherited with an empty mask,
//!    so that its entries have no effect, and no umask can add a permission.
//! 2. Group and owner are set. Mode 0600 gives the group nothing.
//! 3. Extended attributes and the security label are set.
//! 4. The inherited ACL is removed, or the model's ACL is set. From here on the ACL is in effect,
//!    for the right owner and group, and under the right label.
//! 5. The permissions are set.
//!
//! # Best effort
//! With [`Attributes::BestEffort`] an attribute that cannot be set is skipped. [`without_acl`] and
//! [`reduced`] then lower the permissions. A security label that cannot be set has no such
//! substitute: the new file keeps the label that the system's policy gives to new files in its
//! directory.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use super::sys::{self, Kind};
use super::{Attributes, Error, FileStorage, Result, Storage};

/// The extended attribute with the POSIX ACL, which Linux keeps in step with the group's
/// permissions.
const ACL: &str = "system.posix_acl_access";

const ACL_USER: u16 = 0x02;
const ACL_GROUP_OBJ: u16 = 0x04;
const ACL_GROUP: u16 = 0x08;
const ACL_MASK: u16 = 0x10;
const ACL_OTHER: u16 = 0x20;

/// The namespaces whose attributes describe the content or its protection. Those of the file
/// systems themselves (`btrfs.`, `lustre.`, `system.`) describe how a file is stored, or repeat its
/// permissions.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"security.", b"trusted."];

/// Attributes that are bound to one file's content, or privileges of a program, or private to
/// overlayfs.
const NOT_COPIED: [&[u8]; 4] = [b"security.ima", b"security.evm", b"security.capability", b"trusted.overlay."];

/// The attributes of a model, as a new file gets them.
#[derive(Debug)]
struct Model {
    uid: u32,
    gid: u32,
    /// The permissions of owner, group and others. With an ACL, those of the group are the ACL's
    /// mask.
    mode: u32,
    /// The permissions for a file without the ACL.
    mode_without_acl: u32,
    acl: Option<Vec<u8>>,
    /// Extended attributes and the security label.
    extended: Vec<(OsString, Vec<u8>)>,
}

/// Creates a file with the access rights of `model`.
///
/// # Errors
/// As [`super::FileSystem::create_new_like`].
pub(super) fn create(path: &Path, model: &File, attributes: Attributes) -> Result<FileStorage> {
    create_watched(path, model, attributes, &mut |_| {})
}

/// As [`create`]. Calls `watch` with the new file after each step, for tests of the order.
fn create_watched(
    path: &Path,
    model: &File,
    attributes: Attributes,
    watch: &mut dyn FnMut(&File),
) -> Result<FileStorage> {
    // Before the creation, so that a model that cannot be read leaves nothing behind.
    let model = Model::read(model, path, attributes)?;
    let created = FileStorage::create_private(path)?;
    let done = match created.as_file() {
        Some(file) => New { file, path, attributes, watch }.take_over(&model),
        None => Ok(()),
    };
    if let Err(error) = done {
        remove(path, &created);
        return Err(error);
    }
    Ok(created)
}

/// Checks if a file with all access rights of `model` can be created in a directory.
///
/// # Errors
/// As [`super::FileSystem::check_create_like`].
pub(super) fn check(directory: &Path, model: Option<&File>) -> Result<()> {
    let failed = |error| Error::io(&directory.display().to_string(), "create a file in it", 0, error);
    let Some(file) = sys::open_unnamed(directory).map_err(failed)? else {
        return sys::check_writable(directory).map_err(failed);
    };
    let Some(model) = model else { return Ok(()) };
    let attributes = Attributes::Require;
    let model = Model::read(model, directory, attributes)?;
    New { file: &file, path: directory, attributes, watch: &mut |_| {} }.take_over(&model)
}

/// Removes a file that was just created, unless its name belongs to another file by now.
fn remove(path: &Path, created: &FileStorage) {
    let found = std::fs::symlink_metadata(path).ok().and_then(|metadata| sys::file_id(&metadata));
    if found.is_some() && found == created.file_id() {
        // The error that led here is the one that the caller needs.
        let _ = std::fs::remove_file(path);
    }
}

/// Checks if an attribute is copied from a model of this kind. Of a device only the security label
/// is.
fn is_copied(name: &OsStr, device: bool) -> bool {
    let name = name.as_bytes();
    let namespaces = if device { &NAMESPACES[1..2] } else { &NAMESPACES[..] };
    namespaces.iter().any(|namespace| name.starts_with(namespace))
        && !NOT_COPIED.iter().any(|not| name == *not || (not.ends_with(b".") && name.starts_with(not)))
}

impl Model {
    /// Reads the attributes. With [`Attributes::BestEffort`], extended attributes that cannot be
    /// read are left out.
    fn read(file: &File, new: &Path, attributes: Attributes) -> Result<Self> {
        let failed =
            |attribute: String| move |source| Error::Attribute { name: new.display().to_string(), attribute, source };
        let metadata = file.metadata().map_err(failed("owner and mode".to_owned()))?;
        let device = sys::kind(&metadata) == Kind::BlockDevice;
        let permitted = if device { 0o666 } else { 0o777 };
        let mut mode = metadata.mode() & permitted;
        // Without the ACL the meaning of the mode is unknown: no best effort here.
        let mut acl = sys::xattr(file, OsStr::new(ACL)).map_err(failed("ACL".to_owned()))?;
        let mode_without_acl = acl.as_ref().map_or(mode, |acl| without_acl(mode, acl));
        if device {
            (mode, acl) = (mode_without_acl, None);
        }
        let names = match sys::xattr_names(file) {
            Err(error) if attributes == Attributes::Require => {
                return Err(failed("extended attributes".to_owned())(error));
            }
            names => names.unwrap_or_default(),
        };
        let mut extended = Vec::new();
        for name in names.into_iter().filter(|name| is_copied(name, device)) {
            match sys::xattr(file, &name) {
                Ok(Some(value)) => extended.push((name, value)),
                Err(error) if attributes == Attributes::Require => return Err(failed(described(&name))(error)),
                // Removed in the meantime, or skipped.
                Ok(None) | Err(_) => {}
            }
        }
        Ok(Self { uid: metadata.uid(), gid: metadata.gid(), mode, mode_without_acl, acl, extended })
    }
}

/// An extended attribute, as error messages name it.
fn described(name: &OsStr) -> String {
    let kind = if name.as_bytes().starts_with(b"security.") { "security label" } else { "extended attribute" };
    format!("{kind} {}", name.display())
}

/// Returns the permissions that express as much of an ACL as a mode can, without giving anyone
/// more.
///
/// A user with an entry of his own, or in a group with an entry, is in the group or among the
/// others of a file without the ACL. Both get only what every such entry permits. An ACL of another
/// version permits nothing.
///
/// The value is a little-endian version (4 bytes, 2) and entries of 8 bytes: tag (2), permissions
/// (2), id (4).
fn without_acl(mode: u32, acl: &[u8]) -> u32 {
    let entries = acl.strip_prefix(&[2, 0, 0, 0]).unwrap_or_default();
    let (mut group, mut others, mut mask, mut named) = (0, 0, 7, None);
    for entry in entries.chunks_exact(8) {
        let permissions = u32::from(entry[2]) & 7;
        match u16::from_le_bytes([entry[0], entry[1]]) {
            ACL_GROUP_OBJ => group = permissions,
            ACL_OTHER => others = permissions,
            ACL_MASK => mask = permissions,
            ACL_USER | ACL_GROUP => named = Some(named.unwrap_or(7) & permissions),
            _ => {}
        }
    }
    let named = named.map_or(7, |named| named & mask);
    mode & (0o700 | (group & mask & named) << 3 | (others & named))
}

/// Reduces the permissions for a new file whose owner or group is not the model's.
///
/// Each class of users (group, others) gets only what every one of its users has on the model:
///
/// - With another group, the members of the new group are in the model's group or among its others,
///   and so are the new others.
/// - With another owner, the model's owner is in the new group or among the new others.
///
/// The owner's permissions stay. Another owner than the model's is the user of this process, which
/// has the file open and may change its permissions anyway.
fn reduced(mode: u32, same_owner: bool, same_group: bool) -> u32 {
    let [owner, mut group, mut others] = [mode >> 6 & 7, mode >> 3 & 7, mode & 7];
    if !same_group {
        (group, others) = (group & others, group & others);
    }
    if !same_owner {
        (group, others) = (group & owner, others & owner);
    }
    owner << 6 | group << 3 | others
}

/// A new file that takes over a model's attributes.
struct New<'a> {
    file: &'a File,
    /// The path for error messages.
    path: &'a Path,
    attributes: Attributes,
    watch: &'a mut dyn FnMut(&File),
}

impl New<'_> {
    /// Sets all attributes, in the order that the module's head explains.
    fn take_over(self, model: &Model) -> Result<()> {
        (self.watch)(self.file);
        let group = self.set_group(model.gid)?;
        (self.watch)(self.file);
        let owner = self.set_owner(model.uid)?;
        (self.watch)(self.file);
        for (name, value) in &model.extended {
            self.set_extended(name, value)?;
            (self.watch)(self.file);
        }
        let mode = self.set_acl(model, owner && group)?;
        (self.watch)(self.file);
        self.set_permissions(reduced(mode, owner, group))?;
        (self.watch)(self.file);
        Ok(())
    }

    fn failed(&self, attribute: impl Into<String>, source: io::Error) -> Error {
        Error::Attribute { name: self.path.display().to_string(), attribute: attribute.into(), source }
    }

    /// Returns `true` for an attribute that is set. One that is not is an error if it is required.
    fn settled(&self, result: io::Result<bool>, attribute: impl FnOnce() -> String) -> Result<bool> {
        let kept = result.and_then(|kept| if kept { Ok(()) } else { Err(not_kept()) });
        match kept {
            Ok(()) => Ok(true),
            Err(error) if self.attributes == Attributes::Require => Err(self.failed(attribute(), error)),
            Err(_) => Ok(false),
        }
    }

    /// Sets the group before the owner: a process without privileges cannot change the group of a
    /// file of others.
    fn set_group(&self, gid: u32) -> Result<bool> {
        let set = || {
            if self.file.metadata()?.gid() != gid {
                fchown(self.file, None, Some(gid))?;
            }
            Ok(self.file.metadata()?.gid() == gid)
        };
        self.settled(set(), || format!("group {gid}"))
    }

    fn set_owner(&self, uid: u32) -> Result<bool> {
        let set = || {
            if self.file.metadata()?.uid() != uid {
                fchown(self.file, Some(uid), None)?;
            }
            Ok(self.file.metadata()?.uid() == uid)
        };
        self.settled(set(), || format!("owner {uid}"))
    }

    /// Sets an attribute unless the new file has it, which needs no privilege (an inherited label).
    fn set_extended(&self, name: &OsStr, value: &[u8]) -> Result<bool> {
        let has = sys::xattr(self.file, name).ok().flatten().is_some_and(|found| found == value);
        let set = if has { Ok(()) } else { sys::set_xattr(self.file, name, value) };
        self.settled(set.map(|()| true), || described(name))
    }

    /// Sets the model's ACL, or removes the inherited one. Returns the permissions that are right
    /// with the ACL that the new file has then.
    ///
    /// An ACL has entries for the owner and the group of its file, so that it is set only where
    /// these are the model's.
    fn set_acl(&self, model: &Model, is_owned: bool) -> Result<u32> {
        let name = OsStr::new(ACL);
        if let Some(value) = &model.acl
            && is_owned
            && self.settled(sys::set_xattr(self.file, name, value).map(|()| true), || "ACL".to_owned())?
        {
            return Ok(model.mode);
        }
        let removed = sys::remove_xattr(self.file, name).map(|()| true);
        if self.settled(removed, || "an ACL without further entries".to_owned())? {
            return Ok(model.mode_without_acl);
        }
        // The permissions of the group are the mask of the inherited ACL, and stay empty.
        Ok(model.mode_without_acl & 0o707)
    }

    /// Sets the permissions last. Fails in both modes where the file system shows permissions for
    /// group or others that were not asked for, because it keeps none of its own.
    fn set_permissions(&self, mode: u32) -> Result<()> {
        let current = || Ok::<_, io::Error>(self.file.metadata()?.mode() & 0o777);
        let set = || {
            if current()? != mode {
                self.file.set_permissions(Permissions::from_mode(mode))?;
            }
            Ok(current()? == mode)
        };
        let attribute = || format!("mode {mode:04o}");
        if !self.settled(set(), attribute)? && current().map_or(true, |is| is & !mode & 0o077 != 0) {
            return Err(self.failed(attribute(), not_kept()));
        }
        Ok(())
    }
}

fn not_kept() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "the file system does not keep this attribute")
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;
