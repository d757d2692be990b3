//! Commits and pulls.

use std::path::PathBuf;
use std::sync::Arc;

use qcow2_chain::image::Fix;
use qcow2_chain::merge::AfterCommit;
use qcow2_chain::storage::crash::{RecorderOptions, Tree};
use qcow2_chain::storage::{Access, FileSystem, Storage};

use crate::support::protocol::{Protocol, Verdict, repair, wrong};
use crate::support::rng::Rng;
use crate::support::stack::{Merge, Stack};

/// A merge in a random chain.
pub struct Merging {
    stack: Stack,
    merge: Merge,
    start: Tree,
    in_kernel: bool,
    before: Vec<u8>,
    beneath: Vec<u8>,
}

fn path(number: usize) -> PathBuf {
    PathBuf::from(format!("/layer{number}"))
}

impl Merging {
    pub fn random(rng: &mut Rng) -> Self {
        let depth = usize::try_from(rng.within(2..4)).unwrap();
        let stack = Stack::random(rng, depth);
        let merge = Merge::random(rng, depth);
        let before = stack.content().expect("the chain reads");
        let beneath = merge.beneath(&stack);
        let start = stack.files.iter().enumerate().map(|(number, bytes)| (path(number), bytes.clone())).collect();
        Self { stack, merge, start, in_kernel: rng.chance(1, 2), before, beneath }
    }

    fn stack(&self, tree: &Tree) -> Result<Stack, String> {
        let file = |number| tree.get(&path(number)).cloned().ok_or_else(|| format!("layer {number} is gone"));
        Ok(self.stack.with_files((0..self.stack.files.len()).map(file).collect::<Result<_, _>>()?))
    }

    /// The files as they are now, then the chain that they make, written as far as the merge needs.
    fn merge(&self, names: &dyn FileSystem) -> Verdict {
        let open = |number: usize| {
            let access = if number < self.merge.writable() { Access::write() } else { Access::read() };
            names.open(&path(number), &access).map_err(wrong)
        };
        let storages = (0..self.stack.files.len()).map(open).collect::<Result<Vec<Arc<dyn Storage>>, _>>()?;
        let chain = self.stack.open_on(&storages, self.merge.writable())?;
        // Not closed: that would sync once more, and hide what the merge did not make durable.
        self.merge.run(&chain, self.stack.files.len()).map_err(wrong)
    }
}

impl Protocol for Merging {
    fn what(&self) -> String {
        format!("{:?} of {} layers", self.merge, self.stack.files.len())
    }

    fn start(&self) -> &Tree {
        &self.start
    }

    fn recorder(&self) -> RecorderOptions {
        RecorderOptions::default().with_in_kernel(self.in_kernel)
    }

    fn run(&self, names: &Arc<dyn FileSystem>, _promised: &dyn Fn()) -> Verdict {
        self.merge(&**names)
    }

    fn judge(&self, tree: &Tree, promises: usize) -> Verdict {
        let stack = self.stack(tree)?;
        if stack.content()? != self.before {
            return Err("the guest sees another disk".to_owned());
        }
        stack.check(false)?;
        if promises > 0 { self.merge.is_complete(&stack, &self.before, &self.beneath) } else { Ok(()) }
    }

    fn judge_kept(&self, tree: &Tree, promises: usize) -> Verdict {
        self.judge(tree, promises)?;
        self.stack(tree)?.check(true)
    }

    fn recover(&self, names: &Arc<dyn FileSystem>) -> Verdict {
        self.merge(&**names)?;
        (0..self.stack.files.len())
            .filter(|number| !self.stack.is_raw(*number))
            .try_for_each(|number| repair(names.as_ref(), &path(number).to_string_lossy(), Fix::Leaks))
    }

    /// A commit that leaves the overlays as they are copies the same once more.
    fn settles(&self) -> bool {
        !matches!(self.merge, Merge::Commit { after: AfterCommit::Keep, .. })
    }

    fn judge_recovered(&self, tree: &Tree) -> Verdict {
        self.judge_kept(tree, 1)
    }
}
