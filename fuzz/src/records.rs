//! Hostile catalogues and journals: sound ones with some values changed and their checksums computed again. With wrong
//! checksums hardly any of them would be decoded.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use qcow2_chain::format::{ClusterBits, GuestOffset};
use qcow2_chain::image::{CreateOptions, Image};
use qcow2_chain::merge::Direction;
use qcow2_chain::storage::{FileSystem, MemoryFileSystem};
use qcow2_chain::vm::{
    AdoptOptions, Catalogue, Journal, MergeOptions, Model, Plan, Record, Request, SnapshotOptions, SnapshotSet,
    VolumeSpec,
};
use serde::Deserialize;
use serde_json::Value;

/// The path of the VM's catalogue.
pub const CATALOGUE: &str = "/vm/catalogue.json";
/// The path of its journal.
pub const JOURNAL: &str = "/vm/catalogue.json.journal";
/// Values for strings of records: names of the VM, and others.
const STRINGS: [&str; 10] =
    ["vda", "vdb", "vda.qcow2", "vm-vda.1-5eed.qcow2", "/vm/vdb.qcow2", "../../../up", "", "s1", "qcow2", "raw"];
/// The limit of the values of a document.
const MAX_NODES: usize = 10_000;

/// A change of one value of a document.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct Change {
    node: u16,
    to: To,
}

/// The new value.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum To {
    Number(u64),
    Max,
    OneMore,
    OneLess,
    Null,
    Text(u8),
    /// Another value of the document.
    CopyOf(u16),
    /// The value is removed.
    Nothing,
    /// The value is repeated, in a list.
    Twice,
    Empty,
}

/// A VM, and the journal of an operation on it.
#[derive(Debug)]
pub struct World {
    files: MemoryFileSystem,
    catalogue: Value,
    journal: Vec<Value>,
}

/// A VM with two disks and a tree of snapshots, with the journal of each kind of operation.
static WORLDS: LazyLock<Vec<World>> = LazyLock::new(|| {
    let delete = |name: &str| Some(Request::Delete { name: name.into() });
    let create =
        Request::Create { name: "new".into(), description: String::new(), created: 1, quiesce: false, max_depth: 256 };
    let commit = MergeOptions::default().with_direction(Direction::Commit);
    let pull = MergeOptions::default().with_direction(Direction::Pull);
    let begun = [
        (None, &commit),
        (Some(create), &commit),
        (Some(Request::Revert { name: "s1".into(), detach_missing: false }), &commit),
        (delete("s3"), &commit),
        (delete("s3"), &pull),
        (delete("s2"), &commit),
        (delete("s1"), &commit),
        (Some(Request::Resize { volume: "vda".into(), size: 96 << 10, shrink: false }), &commit),
    ];
    begun.iter().map(|(request, options)| world(request.as_ref(), options)).collect()
});

fn world(request: Option<&Request>, options: &MergeOptions) -> World {
    let shared = Arc::new(MemoryFileSystem::new());
    let names: Arc<dyn FileSystem> = shared.clone();
    for volume in ["vda", "vdb"] {
        let bits = ClusterBits::new(9).expect("512 bytes");
        let disk = names.create_new(&Path::new("/vm").join(volume).with_extension("qcow2")).expect("a file is made");
        let image =
            Image::create(disk, &CreateOptions::new(64 << 10).with_cluster_bits(bits)).expect("an image is made");
        image.write_at(&[7; 3000], GuestOffset::new(1000)).expect("written");
        image.close().expect("closed");
    }
    let volumes = [VolumeSpec::new("vda", "/vm/vda.qcow2"), VolumeSpec::new("vdb", "/vm/vdb.qcow2")];
    let set = SnapshotSet::adopt_in(names.clone(), CATALOGUE, &volumes, &AdoptOptions::default()).expect("adopted");
    let taken = |name| drop(set.create(name, &SnapshotOptions::default()).expect("taken"));
    taken("s1");
    taken("s2");
    set.revert("s1", &MergeOptions::default(), &()).expect("reverted");
    taken("s3");
    let mut journal = Vec::new();
    if let Some(request) = request {
        let plan: Plan = set.plan(request, options).expect("planned");
        drop(Journal::begin(&names, Path::new(JOURNAL), Path::new(CATALOGUE), &plan).expect("begun"));
        let bytes = shared.get(JOURNAL).expect("a journal").to_vec();
        journal.push(serde_json::from_slice(&bytes[9..]).expect("a journal is JSON"));
        names.unlink(Path::new(JOURNAL)).expect("removed");
        if plan.stages.iter().any(|stage| !stage.create.is_empty()) {
            journal.push(serde_json::to_value(Record::Created { stage: 0 }).expect("a record is JSON"));
        }
        for (stage, work) in
            plan.stages.iter().enumerate().flat_map(|(at, stage)| stage.work.iter().map(move |w| (at, w)))
        {
            let changing = Record::Changing { stage, volume: work.volume.clone(), step: 0 };
            let done = Record::Done { stage, volume: work.volume.clone(), step: 0, switched: false };
            journal.extend([changing, done].map(|record| serde_json::to_value(record).expect("a record is JSON")));
        }
    }
    let catalogue = serde_json::from_slice(&shared.get(CATALOGUE).expect("a catalogue").to_vec()).expect("it is JSON");
    names.unlink(Path::new(CATALOGUE)).expect("removed");
    World { files: shared.copy(), catalogue, journal }
}

/// Returns all worlds.
pub fn worlds() -> &'static [World] {
    &WORLDS
}

impl World {
    /// Returns a copy of its files, without catalogue and journal. The files keep their identities, which the plan has.
    pub fn names(&self) -> Arc<MemoryFileSystem> {
        Arc::new(self.files.copy())
    }

    /// Returns its catalogue after these changes, with a correct checksum if one can be computed.
    pub fn catalogue(&self, changes: &[Change]) -> Vec<u8> {
        let mut document = self.catalogue.clone();
        changes.iter().for_each(|change| change.apply(&mut document));
        // A text without a valid model is passed on as it is.
        let model = document.get("model").and_then(|model| Model::deserialize(model).ok());
        match model.and_then(|model| Catalogue::encode(&model).ok()) {
            Some(text) => text,
            None => document.to_string().into_bytes(),
        }
    }

    /// Returns the first records of its journal after these changes, each with a correct checksum.
    pub fn journal(&self, changes: &[Change], records: usize) -> Vec<u8> {
        let mut document = Value::Array(self.journal.iter().take(records).cloned().collect());
        changes.iter().for_each(|change| change.apply(&mut document));
        let lines = document.as_array().into_iter().flatten().map(|record| {
            let json = record.to_string();
            format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
        });
        lines.collect::<String>().into_bytes()
    }
}

/// Returns the paths of all values of a document.
fn nodes(value: &Value) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut next = 0;
    while let Some(path) = found.get(next).filter(|_| found.len() < MAX_NODES).cloned() {
        next += 1;
        match value.pointer(&path) {
            Some(Value::Object(fields)) => found.extend(fields.keys().map(|key| format!("{path}/{}", escaped(key)))),
            Some(Value::Array(items)) => found.extend((0..items.len()).map(|index| format!("{path}/{index}"))),
            _ => {}
        }
    }
    found
}

fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

impl Change {
    fn apply(self, document: &mut Value) {
        let nodes = nodes(document);
        let pick = |number: u16| &nodes[usize::from(number) % nodes.len()];
        let path = pick(self.node);
        let old = document.pointer(path).cloned().unwrap_or_default();
        let number = old.as_u64().unwrap_or_default();
        let new = match self.to {
            To::Number(number) => number.into(),
            To::Max => u64::MAX.into(),
            To::OneMore => number.wrapping_add(1).into(),
            To::OneLess => number.wrapping_sub(1).into(),
            To::Null => Value::Null,
            To::Text(which) => STRINGS[usize::from(which) % STRINGS.len()].into(),
            To::CopyOf(other) => document.pointer(pick(other)).cloned().unwrap_or_default(),
            To::Empty if old.is_array() => Value::Array(Vec::new()),
            To::Empty => Value::Object(serde_json::Map::new()),
            To::Nothing | To::Twice => return self.apply_to_parent(document, path, old),
        };
        // Repeated copies of the document into itself would grow without end.
        if nodes.len() < MAX_NODES
            && let Some(value) = document.pointer_mut(path)
        {
            *value = new;
        }
    }

    fn apply_to_parent(self, document: &mut Value, path: &str, old: Value) {
        let Some((parent, last)) = path.rsplit_once('/') else { return };
        let twice = matches!(self.to, To::Twice);
        match document.pointer_mut(parent) {
            Some(Value::Array(items)) if twice => items.push(old),
            Some(Value::Array(items)) => {
                let index = last.parse().unwrap_or(usize::MAX);
                if index < items.len() {
                    items.remove(index);
                }
            }
            Some(Value::Object(fields)) if !twice => {
                fields.remove(last);
            }
            _ => {}
        }
    }
}
