//! Events for the `tracing` facade, if the feature `tracing` is on.

/// Emits an event: a message, and fields in the syntax of `tracing`.
macro_rules! event {
    ($message:literal $(, $($fields:tt)*)?) => {
        #[cfg(feature = "tracing")]
        tracing::info!(target: "qcow2_chain::vm", $($($fields)*,)? $message);
    };
}

pub(super) use event;
