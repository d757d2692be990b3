//! A snapshot with frozen file systems, of a guest whose agent may not answer.

use std::time::Duration;

use super::hypervisor::{FailureKind, Hypervisor, HypervisorError, NewTop, Result};

/// The time for which a thaw is retried, and the pause between two attempts.
const THAW_FOR: Duration = Duration::from_secs(30);
const THAW_EVERY: Duration = Duration::from_secs(1);

/// Takes a snapshot of a guest with frozen file systems, with a time limit for the agent's answers.
/// The limit belongs to the VM and is restored afterwards.
pub(super) fn quiesced(hypervisor: &dyn Hypervisor, tops: &[NewTop], agent_timeout: Duration) -> Result<()> {
    hypervisor.set_agent_timeout(Some(agent_timeout))?;
    let done = snapshot(hypervisor, tops);
    // The result of the snapshot counts. A VM that stopped, or a connection that broke, leaves
    // nothing to restore.
    let _ = hypervisor.set_agent_timeout(None);
    done
}

/// Takes the snapshot. An agent that did not answer the freeze in time may still execute it. The
/// guest is then thawed, with retries: the agent's first answers belong to the freeze.
fn snapshot(hypervisor: &dyn Hypervisor, tops: &[NewTop]) -> Result<()> {
    let done = hypervisor.snapshot(tops, true);
    let Err(error) = &done else { return done };
    if error.kind != FailureKind::AgentTimeout {
        return done;
    }
    let start = hypervisor.now();
    loop {
        let Err(why) = hypervisor.thaw() else { return done };
        if matches!(why.kind, FailureKind::Gone | FailureKind::NoAgent) {
            return done;
        }
        if hypervisor.now().saturating_sub(start) >= THAW_FOR {
            let seconds = THAW_FOR.as_secs();
            let message =
                format!("{error}; the guest may be frozen: it could not be thawed within {seconds} s ({why})");
            return Err(HypervisorError::new(FailureKind::AgentTimeout, message));
        }
        hypervisor.wait(&tops[0].disk, THAW_EVERY);
    }
}
