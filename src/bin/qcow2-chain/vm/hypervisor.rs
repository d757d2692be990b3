//! The hypervisor of a VM that may be running.

use std::path::Path;

use qcow2_chain::vm::SnapshotSet;

use super::outcome::explain;
use crate::failure::Failure;

/// The options of verbs that reach a running VM.
#[derive(clap::Args, Debug)]
pub(super) struct HypervisorArgs {
    #[arg(
        long,
        value_name = "URI",
        requires = "domain",
        help = "The libvirt under which the VM may run, such as qemu:///system. Without it the VM must be off"
    )]
    connect: Option<String>,
    /// The VM's name or UUID in that libvirt
    #[arg(long, value_name = "NAME", requires = "connect")]
    domain: Option<String>,
    /// The time limit for one volume's merge in the running VM, in seconds; 0 for no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 0, requires = "connect")]
    timeout: u64,
    /// The treatment of a merge that takes longer: keep its job running, so that the same command
    /// takes it over; or abort it
    #[arg(long, value_enum, default_value = "keep", requires = "connect")]
    on_timeout: OnTimeout,
    /// The time limit for an answer of the guest agent, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, requires = "connect")]
    agent_timeout: u64,
}

/// The treatment of a merge that exceeds its time limit.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum OnTimeout {
    /// Its job continues.
    Keep,
    /// Its job is ended.
    Abort,
}

impl HypervisorArgs {
    /// Loads a set. It uses the hypervisor if the options name one.
    pub(super) fn load(&self, catalogue: &Path) -> Result<SnapshotSet, Failure> {
        let set = SnapshotSet::load(catalogue).map_err(explain)?;
        match (&self.connect, &self.domain) {
            (Some(uri), Some(domain)) => self.attach(set, uri, domain),
            _ => Ok(set),
        }
    }

    #[cfg(feature = "libvirt")]
    fn attach(&self, set: SnapshotSet, uri: &str, domain: &str) -> Result<SnapshotSet, Failure> {
        use std::sync::Arc;
        use std::time::Duration;

        use qcow2_chain::libvirt::{Libvirt, Listening};
        use qcow2_chain::live::{LiveExecutor, OnTimeout as Then};

        let hypervisor = Libvirt::connect(uri, domain, Listening::OwnLoop)
            .map_err(|error| Failure::new(format!("{uri}: {error}")))?;
        let then = match self.on_timeout {
            OnTimeout::Keep => Then::Keep,
            OnTimeout::Abort => Then::Abort,
        };
        let live = LiveExecutor::new(Arc::new(hypervisor))
            .with_timeout(Duration::from_secs(self.timeout), then)
            .with_agent_timeout(Duration::from_secs(self.agent_timeout));
        Ok(set.with_executor(Arc::new(live)))
    }

    #[cfg(not(feature = "libvirt"))]
    #[expect(clippy::unused_self, reason = "as with the feature")]
    fn attach(&self, _set: SnapshotSet, uri: &str, domain: &str) -> Result<SnapshotSet, Failure> {
        let why = format!("{domain} on {uri}: this program was built without the feature libvirt");
        Err(Failure::new(why).with_hint("Build it with --features cli,libvirt"))
    }
}
