//! `check -r` of damaged images.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::format::{GuestOffset, HeaderCluster, Limits};
use qcow2_chain::image::{CheckOptions, CheckReport, Fix, Image, OpenOptions, Severity, check};
use qcow2_chain::storage::crash::Tree;
use qcow2_chain::storage::{FileSystem, Storage};

use crate::support::images::{UNKNOWN, random_image, vouch};
use crate::support::protocol::{Protocol, Verdict, memory, repair, wrong};
use crate::support::rng::Rng;
use crate::support::victim::{DAMAGES, Damage, Victim};

const PATH: &str = "/disk";
const SECTOR: usize = 512;

/// One repair, and what it led to where nothing went wrong.
pub struct Repair {
    start: Tree,
    fix: Fix,
    damages: Vec<Damage>,
    before: Told,
    after: Told,
}

/// What can be told of a damaged image: the report, and what the guest reads sector by sector, where that can be read.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
    /// The clusters with more references than their refcount says: those that a writer might overwrite.
    unguarded: Vec<u64>,
    /// The warnings in the header, and what else programs that do not know all must heed.
    features: (u64, u64),
    sectors: Vec<Option<Vec<u8>>>,
}

impl Told {
    fn of(tree: &Tree) -> Result<Self, String> {
        let storage = memory(tree, PATH)?;
        let CheckReport { corruptions, leaks, check_errors, findings, .. } =
            check(&*storage, &CheckOptions::default()).map_err(wrong)?;
        let refcounts = findings.iter().filter(|f| f.structure == "refcount" && f.severity == Severity::Corruption);
        let unguarded = refcounts.map(|finding| finding.offset).collect();
        let features = HeaderCluster::decode(&storage.to_vec(), storage.len().map_err(wrong)?, &Limits::default());
        let features = features.map(|head| (head.header.incompatible_features.0, head.header.autoclear_features.0));
        let features = features.map_err(wrong)?;
        let mut sectors = Vec::new();
        if let Ok(image) = Image::open(storage, &OpenOptions::default()) {
            let mut at = 0;
            while at < image.virtual_size() {
                let mut sector = vec![0; SECTOR];
                let read = image.read_present(&mut sector, GuestOffset::new(at), &mut Vec::new());
                sectors.push(read.is_ok().then_some(sector));
                at += SECTOR as u64;
            }
        }
        Ok(Self { corruptions, leaks, check_errors, unguarded, features, sectors })
    }
}

impl Repair {
    /// A random repair of random damage that `check` can deal with at all.
    pub fn random(rng: &mut Rng) -> Self {
        loop {
            let size = rng.within(8..96) * 512;
            let (mut image, _) = random_image(rng, size, None);
            if rng.chance(1, 4) {
                vouch(rng, &mut image);
            }
            let mut victim = Victim { bytes: image };
            let damages: Vec<Damage> = (0..rng.within(1..4)).map(|_| rng.pick(&DAMAGES)).collect();
            for damage in &damages {
                victim.damage(*damage, rng);
            }
            let start: Tree = [(PATH.into(), victim.bytes)].into();
            let fix = rng.pick(&[Fix::Leaks, Fix::All, Fix::All]);
            let Ok(before) = Told::of(&start) else { continue };
            let recorder = qcow2_chain::storage::crash::Recorder::new();
            let names = recorder.names(&start);
            if repair(&names, PATH, fix).is_err() || recorder.log().is_unchanged() {
                continue;
            }
            let after = Told::of(&names.tree()).expect("it could be checked before");
            return Self { start, fix, damages, before, after };
        }
    }
}

impl Protocol for Repair {
    fn what(&self) -> String {
        format!("{:?} of {:?}", self.fix, self.damages)
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        repair(&**names, PATH, self.fix)
    }

    /// No sector reads otherwise than before or after the repair, and nothing is worse than it was.
    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let now = Told::of(tree)?;
        if promises > 0 && now != self.after {
            return Err("not what the repair led to".to_owned());
        }
        let path = Path::new(PATH);
        if now.features.1 & UNKNOWN != 0 && tree[path][512..] != self.start[path][512..] {
            return Err("an unknown feature still vouches for what was repaired".to_owned());
        }
        let sector = |of: &Told, at: usize| of.sectors.get(at).cloned().flatten();
        for at in 0..now.sectors.len() {
            let shown = sector(&now, at);
            if shown != sector(&self.before, at) && shown != sector(&self.after, at) {
                return Err(format!("sector {at} reads as neither before nor after"));
            }
        }
        // A repair may make the file longer, so that what pointed past its end no longer does.
        let inside = |at: &&u64| **at < self.start[path].len() as u64;
        if let Some(at) = now.unguarded.iter().filter(inside).find(|at| !self.before.unguarded.contains(at)) {
            return Err(format!("the cluster at {at:#x} is in use more often now than its refcount says"));
        }
        if now.check_errors > 0 && self.before.check_errors == 0 && self.after.check_errors == 0 {
            return Err(format!("{} structures cannot be checked any more", now.check_errors));
        }
        Ok(())
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        self.run(names, &|| ())
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        let now = Told::of(tree)?;
        if !tree.contains_key(Path::new(PATH)) || now != self.after {
            return Err(format!(
                "repaired again: {} corruptions, {} leaks, {} errors; at once {}, {}, {}",
                now.corruptions,
                now.leaks,
                now.check_errors,
                self.after.corruptions,
                self.after.leaks,
                self.after.check_errors
            ));
        }
        Ok(())
    }
}
