//! Freezing a guest that may not answer.

use std::time::Duration;

use super::hypervisor::{FailureKind, Hypervisor, HypervisorError, NewTop, Result};

/// How long a guest that may be frozen is told to let go, and how often.
const THAW_FOR: Duration = Duration::from_secs(30);
const THAW_EVERY: Duration = Duration::from_secs(1);

/// Takes a snapshot of a guest whose file systems are in order. An agent that did not answer in time may still obey, later:
/// then the guest is told to let go, for a while, as the first answers are those to the freeze.
pub(super) fn quiesced(hypervisor: &dyn Hypervisor, tops: &[NewTop], agent_timeout: Duration) -> Result<()> {
    hypervisor.set_agent_timeout(agent_timeout)?;
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
            let message = format!("{error}; the guest may be frozen: it could not be told to let go ({why})");
            return Err(HypervisorError::new(FailureKind::AgentTimeout, message));
        }
        hypervisor.wait(&tops[0].disk, THAW_EVERY);
    }
}
