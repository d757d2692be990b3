//! Events for those who listen, through the `tracing` facade where feature `tracing` is on.

/// Tells of something: a message, and fields as `tracing` takes them.
macro_rules! event {
    ($what:literal $(, $($fields:tt)*)?) => {
        #[cfg(feature = "tracing")]
        tracing::info!(target: "qcow2_chain::vm", $($($fields)*,)? $what);
    };
}

pub(super) use event;
