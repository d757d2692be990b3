//! libvirt's XML: reads a domain's disks, and writes the description of a snapshot.

use std::fmt::Write as _;
use std::path::PathBuf;

use roxmltree::{Document, Node};

use crate::chain::Format;
use crate::live::{Disk, DiskFile, Mirror, NewTop};

/// The disks of a domain.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disks {
    /// The disks that are files or block devices.
    pub(super) known: Vec<Disk>,
    /// The names of all disks.
    pub(super) names: Vec<String>,
}

/// Reads the disks from a domain's XML (libvirt: "Domain XML format", Hard drives, floppy disks,
/// CDROMs).
pub(super) fn disks(xml: &str) -> Result<Disks, String> {
    let document = Document::parse(xml).map_err(|error| format!("the domain's XML: {error}"))?;
    let devices = child(document.root_element(), "devices");
    let disks = devices.into_iter().flat_map(|devices| children(devices, "disk"));
    let mut found = Disks { known: Vec::new(), names: Vec::new() };
    for node in disks {
        let Some(name) = child(node, "target").and_then(|target| target.attribute("dev")) else { continue };
        found.names.push(name.to_owned());
        let is_disk = matches!(node.attribute("device"), None | Some("disk" | "lun"));
        let Some(path) = source(node).filter(|_| is_disk) else { continue };
        let format = child(node, "driver").and_then(|driver| driver.attribute("type"));
        let mut files = vec![DiskFile { path, format: format.and_then(named) }];
        let mut next = child(node, "backingStore");
        while let Some(store) = next {
            // An empty element ends the chain.
            let Some(path) = source(store) else { break };
            let format = child(store, "format").and_then(|format| format.attribute("type"));
            files.push(DiskFile { path, format: format.and_then(named) });
            next = child(store, "backingStore");
        }
        found.known.push(Disk { name: name.to_owned(), files, mirror: child(node, "mirror").and_then(mirror) });
    }
    Ok(found)
}

fn mirror(node: Node<'_, '_>) -> Option<Mirror> {
    let path = source(node).or_else(|| node.attribute("file").map(PathBuf::from))?;
    Some(Mirror { path, ready: node.attribute("ready") == Some("yes") })
}

fn source(node: Node<'_, '_>) -> Option<PathBuf> {
    let source = child(node, "source")?;
    source.attribute("file").or_else(|| source.attribute("dev")).map(PathBuf::from)
}

fn named(format: &str) -> Option<Format> {
    [Format::Qcow2, Format::Raw].into_iter().find(|known| known.name() == format)
}

fn children<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    children(node, name).next()
}

/// Describes a snapshot of these disks into files that exist, without the other disks (libvirt:
/// "Snapshot XML format").
pub(super) fn snapshot(tops: &[NewTop], all: &[String]) -> Result<String, String> {
    let mut xml = String::from("<domainsnapshot><memory snapshot='no'/><disks>");
    for name in all.iter().filter(|name| !tops.iter().any(|top| top.disk == **name)) {
        let _ = write!(xml, "<disk name='{}' snapshot='no'/>", escaped(name));
    }
    for top in tops {
        let path = top.file.to_str().ok_or_else(|| format!("{}: libvirt requires UTF-8 paths", top.file.display()))?;
        let _ = write!(
            xml,
            "<disk name='{}' snapshot='external' type='file'><driver type='qcow2'/><source file='{}'/></disk>",
            escaped(&top.disk),
            escaped(path)
        );
    }
    xml += "</disks></domainsnapshot>";
    Ok(xml)
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '\'' => out += "&apos;",
            '"' => out += "&quot;",
            // A parser would convert them to spaces.
            '\n' | '\r' | '\t' => {
                let _ = write!(out, "&#{};", u32::from(character));
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain type='kvm'><name>vm</name><devices>
        <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vm/a&amp;b.1.qcow2' index='4'/>
          <backingStore type='file' index='3'><format type='raw'/><source file='/vm/a'/><backingStore/></backingStore>
          <mirror type='file' job='active-commit' ready='yes'><format type='raw'/><source file='/vm/a' index='3'/></mirror>
          <target dev='vda' bus='virtio'/></disk>
        <disk type='block'><driver type='raw'/><source dev='/dev/vg/b'/><target dev='vdb'/></disk>
        <disk type='network'><source protocol='rbd' name='pool/c'/><target dev='vdc'/></disk>
        <disk type='file'><driver type='qed'/><source file='/vm/d'/><mirror type='file' file='/vm/e'/><target dev='vdd'/></disk>
        </devices></domain>";

    fn file(path: &str, format: Option<Format>) -> DiskFile {
        DiskFile { path: path.into(), format }
    }

    #[test]
    fn disks_files_and_devices_with_backing_files() {
        let Disks { known, names } = disks(DOMAIN).unwrap();
        assert_eq!(names, ["sda", "vda", "vdb", "vdc", "vdd"]);
        assert_eq!(known.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["vda", "vdb", "vdd"]);
        assert_eq!(known[0].files, [file("/vm/a&b.1.qcow2", Some(Format::Qcow2)), file("/vm/a", Some(Format::Raw))]);
        assert_eq!(known[0].mirror, Some(Mirror { path: "/vm/a".into(), ready: true }));
        assert_eq!(known[1].files, [file("/dev/vg/b", Some(Format::Raw))]);
        assert_eq!(known[2].files, [file("/vm/d", None)]);
        assert_eq!(known[2].mirror, Some(Mirror { path: "/vm/e".into(), ready: false }));
    }

    #[test]
    fn disks_invalid_xml_fails_and_no_devices_is_empty() {
        assert!(disks("<domain").unwrap_err().contains("XML"));
        assert_eq!(disks("<domain/>").unwrap(), Disks { known: Vec::new(), names: Vec::new() });
    }

    #[test]
    fn snapshot_names_all_disks_and_escapes_paths() {
        let top = NewTop { disk: "vda".into(), file: "/vm/a'<&>\".qcow2".into() };
        let xml = snapshot(&[top], &["sda".into(), "vda".into()]).unwrap();
        let document = Document::parse(&xml).unwrap();
        let disks: Vec<Node<'_, '_>> = document.descendants().filter(|node| node.has_tag_name("disk")).collect();
        assert_eq!(disks[0].attribute("snapshot"), Some("no"));
        assert_eq!(disks[1].attribute("name"), Some("vda"));
        assert_eq!(source(disks[1]), Some("/vm/a'<&>\".qcow2".into()));
    }
}
