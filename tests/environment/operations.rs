//! Operations on the VM of a world, with what must become of it.

use std::ffi::OsString;
use std::fmt::Display;
use std::time::Instant;

use qcow2_chain::vm::{MergeOptions, MergePreference, SnapshotOptions, SnapshotSet};

use super::images::{self, commands};
use super::names::volume_argument;
use super::oracle::{Before, Listing};
use super::program::{Run, args};
use super::world::{State, World};
use crate::support::rng::Rng;

/// The expected outcome of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Done,
    Refused,
    /// Done or refused: the oracle judges both.
    Either,
}

/// An operation on the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Snapshot { name: String },
    Delete { name: String, direction: Option<&'static str> },
    Revert { name: String, more: Vec<&'static str> },
    Resize { volume: String, size: u64 },
    Detach { volume: String },
}

impl Op {
    /// A random operation that the VM's snapshots allow.
    pub fn random(world: &mut World<'_>, rng: &mut Rng) -> Self {
        let names: Vec<String> = world.state.taken.keys().cloned().collect();
        let volumes: Vec<String> = world.state.now.keys().cloned().collect();
        match rng.within(0..16) {
            0..5 if !names.is_empty() => Self::delete(&names, rng),
            5..8 if !names.is_empty() => Self::revert(world, &names, rng),
            8 | 9 => {
                let volume = rng.pick(&volumes);
                let size = rng.within(16..300) * 4096;
                let fixed = world.device.is_some() && volume == "vda";
                if fixed { Self::snapshot(world, rng) } else { Self::Resize { volume, size } }
            }
            10 if volumes.len() > 1 => Self::Detach { volume: rng.pick(&volumes) },
            _ => Self::snapshot(world, rng),
        }
    }

    /// A random operation among those that other programs and damages can disturb.
    pub fn disturbed(world: &mut World<'_>, rng: &mut Rng) -> Self {
        let names: Vec<String> = world.state.taken.keys().cloned().collect();
        match rng.within(0..4) {
            0 | 1 if !names.is_empty() => Self::delete(&names, rng),
            2 if !names.is_empty() => Self::Revert { name: rng.pick(&names), more: Vec::new() },
            _ => Self::snapshot(world, rng),
        }
    }

    fn delete(names: &[String], rng: &mut Rng) -> Self {
        let direction = rng.pick(&[None, None, Some("commit"), Some("pull"), Some("pull"), Some("auto")]);
        Self::Delete { name: rng.pick(names), direction }
    }

    /// A revert, sometimes with the consent to detach volumes that the snapshot lacks.
    fn revert(world: &World<'_>, names: &[String], rng: &mut Rng) -> Self {
        let name = rng.pick(names);
        let lacks = lacks_a_volume(&world.state, &name);
        let consents = lacks && rng.chance(1, 2);
        let more = if consents { vec!["--detach-missing"] } else { Vec::new() };
        Self::Revert { name, more }
    }

    fn snapshot(world: &mut World<'_>, rng: &mut Rng) -> Self {
        world.next += 1;
        let odd = rng.pick(&["s", "s", "s", "nightly backup ", "снимок-", "a:b,c'd\"-"]);
        Self::Snapshot { name: format!("{odd}{}", world.next) }
    }

    /// The column in the table of results.
    pub fn column(&self) -> &'static str {
        match self {
            Self::Snapshot { .. } => "snapshot",
            Self::Delete { direction: Some("pull"), .. } => "delete pull",
            Self::Delete { direction: Some("auto"), .. } => "delete auto",
            Self::Delete { .. } => "delete commit",
            Self::Revert { .. } => "revert",
            Self::Resize { .. } => "resize",
            Self::Detach { .. } => "detach",
        }
    }

    fn verb(&self) -> &'static str {
        match self {
            Self::Snapshot { .. } => "snapshot",
            Self::Delete { .. } => "delete",
            Self::Revert { .. } => "revert",
            Self::Resize { .. } => "resize",
            Self::Detach { .. } => "detach",
        }
    }

    fn arguments(&self, world: &World<'_>) -> Vec<OsString> {
        match self {
            Self::Snapshot { name } => args(&[name]),
            Self::Delete { name, direction } => {
                let direction = direction.iter().flat_map(|direction| args(&["--direction", direction]));
                args(&[name]).into_iter().chain(direction).collect()
            }
            Self::Revert { name, more } => args(&[name]).into_iter().chain(args(more)).collect(),
            Self::Resize { volume, size } => {
                let shrinks = *size < world.state.now[volume].len() as u64;
                let shrink = shrinks.then(|| OsString::from("--shrink"));
                args(&[volume, &size.to_string()]).into_iter().chain(shrink).collect()
            }
            Self::Detach { volume } => args(&[volume]),
        }
    }

    /// The states that the VM may be in afterwards.
    pub fn after(&self, state: &State) -> Vec<State> {
        let mut after = state.clone();
        match self {
            Self::Snapshot { name } => drop(after.taken.insert(name.clone(), state.now.clone())),
            Self::Delete { name, .. } => drop(after.taken.remove(name)),
            Self::Revert { name, .. } => {
                after.now.clone_from(&state.taken[name]);
                // A volume that was detached since does not come back.
                let mut without = after.clone();
                without.now.retain(|volume, _| state.now.contains_key(volume));
                return vec![after, without];
            }
            Self::Resize { volume, size } => {
                let content = after.now.get_mut(volume).expect("a volume");
                content.resize(usize::try_from(*size).unwrap(), 0);
            }
            Self::Detach { volume } => {
                after.now.remove(volume);
                let mut without = after.clone();
                without.taken.values_mut().for_each(|contents| drop(contents.remove(volume)));
                return vec![after, without];
            }
        }
        vec![after]
    }

    /// The outcome that the rules of a set require in an undamaged world where no other program
    /// holds a file.
    pub fn expect(&self, world: &World<'_>) -> Expect {
        let state = &world.state;
        let same_volumes = state.taken.values().all(|contents| contents.keys().eq(state.now.keys()));
        match self {
            Self::Revert { name, more } if lacks_a_volume(state, name) && more.is_empty() => Expect::Refused,
            Self::Delete { .. } | Self::Revert { .. } if !same_volumes || world.has_clones() => Expect::Either,
            // A file that left the set may still depend on files of the set.
            Self::Delete { .. } | Self::Revert { .. } if world.leftovers => Expect::Either,
            Self::Resize { .. } if world.has_clones() => Expect::Either,
            _ => Expect::Done,
        }
    }
}

/// Returns `true` if a volume of the present is missing in a snapshot.
fn lacks_a_volume(state: &State, snapshot: &str) -> bool {
    state.now.keys().any(|volume| !state.taken[snapshot].contains_key(volume))
}

impl Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl World<'_> {
    /// Returns `true` if an image outside the set is backed by a file of the set.
    pub fn has_clones(&self) -> bool {
        self.recipe.clones && self.neighbours.iter().any(|neighbour| neighbour.clone_of_ours)
    }

    /// Arguments of an operation for the program.
    pub fn command(&mut self, op: &Op, rng: &mut Rng) -> Vec<OsString> {
        let mut more = op.arguments(self);
        if rng.chance(1, 2) && !matches!(op, Op::Detach { .. }) {
            more.push("--json".into());
        }
        self.verb(op.verb(), &more, rng)
    }

    /// Does an operation by the program, or by the library where the world says so.
    pub fn act(&mut self, op: &Op, rng: &mut Rng) -> Run {
        let by_library = self.recipe.library && self.caller.user.is_none() && rng.chance(1, 2);
        let run = match op {
            Op::Snapshot { .. } | Op::Delete { .. } | Op::Revert { .. } if by_library => self.by_library(op),
            _ => {
                let args = self.command(op, rng);
                self.caller.run(&args)
            }
        };
        self.pace = run.time;
        let code = run.code.unwrap_or(-1);
        self.log.push(format!("{op} -> {code} {}", run.stderr.lines().next().unwrap_or_default()));
        run
    }

    /// Does an operation by the library in this process.
    fn by_library(&self, op: &Op) -> Run {
        let begun = Instant::now();
        let done = SnapshotSet::load(&self.catalogue).and_then(|set| match op {
            Op::Snapshot { name } => set.create(name, &SnapshotOptions::default()),
            Op::Revert { name, more } => {
                let options = MergeOptions::default().with_discard_lost(more.contains(&"--discard-lost"));
                set.revert(name, &options.with_detach_missing(more.contains(&"--detach-missing")), &())
            }
            Op::Delete { name, direction } => {
                let options = MergeOptions::default();
                let options = match direction {
                    None => options,
                    Some("pull") => options.with_direction(MergePreference::Pull),
                    Some("auto") => options.with_direction(MergePreference::Auto),
                    Some(_) => options.with_direction(MergePreference::Commit),
                };
                set.delete(name, &options, &())
            }
            Op::Resize { .. } | Op::Detach { .. } => unreachable!("not done by the library here"),
        });
        let time = begun.elapsed();
        match done {
            Ok(report) => {
                Run { code: Some(0), stdout: format!("{report:?}"), bytes: Vec::new(), stderr: String::new(), time }
            }
            Err(error) => {
                Run { code: Some(1), stdout: String::new(), bytes: Vec::new(), stderr: error.to_string(), time }
            }
        }
    }

    /// Removes the clones of active files: they lose their base by the next write, whichever program manages
    /// the images.
    pub fn drop_clones_of_active(&mut self) {
        for clone in self.neighbours.extract_if(.., |neighbour| neighbour.on_active) {
            std::fs::remove_file(clone.path).expect("the clone is there");
        }
    }

    /// The guest writes to its volumes, by QEMU.
    pub fn guest_writes(&mut self, listing: &Listing, rng: &mut Rng) {
        self.drop_clones_of_active();
        for (volume, path) in &listing.active {
            let content = self.state.now.get_mut(volume).expect("a volume of the model");
            let writes = images::writes(content.len() as u64, rng);
            let run = self.grounds.qemu.try_io(path, images::format_of(path).name(), &commands(&writes));
            assert_eq!(run.code, 0, "the guest cannot write {}: {}{}", path.display(), run.stdout, run.stderr);
            images::apply(content, &writes);
        }
        self.log.push("guest writes".to_owned());
    }

    /// Attaches a new volume.
    pub fn attach(&mut self, rng: &mut Rng) -> (Before, Run, State) {
        self.next += 1;
        let (name, size) = (format!("more{}", self.next), 256 << 10);
        let path = self.dirs[0].join(self.recipe.naming.image(&name, "qcow2"));
        images::create(&path, false, size, None);
        let writes = images::writes(size, rng);
        images::write(&path, &writes);
        self.recipe.access.apply(&path);
        let mut after = self.state.clone();
        let content = after.now.entry(name.clone()).or_insert_with(|| vec![0; usize::try_from(size).unwrap()]);
        images::apply(content, &writes);
        let before = self.before(rng);
        let args = self.verb("attach", &["--volume".into(), volume_argument(&name, &path, &[])], rng);
        let run = self.caller.run(&args);
        self.log.push(format!("attach {name} -> {:?} {}", run.code, run.stderr));
        (before, run, after)
    }
}
