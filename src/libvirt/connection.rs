//! A connection to a libvirt daemon, which is closed when it is dropped.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use virt::connect::Connect;
use virt::error::{Error, ErrorNumber};

use super::events::{self, Mailbox};
use super::{Listening, raw};
use crate::live::{FailureKind, HypervisorError, Result};

/// Keep-alive messages: one every 5 seconds, and the connection is closed after 5 without an
/// answer. A call to a daemon that hangs therefore fails after about 30 seconds.
const KEEP_ALIVE: (i32, u32) = (5, 5);
/// The longest wait for a new connection. Keep-alives cannot end this wait, because they start
/// after the handshake.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// One connection and its event callbacks.
///
/// `Connect` of `virt` 0.4 has no `Drop`: each handle needs one call of `close`. Each registered
/// callback holds one more reference, so that the socket stays open until the callback is removed.
/// This type is shared in an [`Arc`], and no handle is cloned.
#[derive(Debug)]
pub(super) struct Connection {
    connect: Connect,
    callbacks: Vec<i32>,
}

impl Connection {
    /// Opens a connection, starts its keep-alives and, unless `listening` is [`Listening::Poll`],
    /// registers for events.
    ///
    /// # Errors
    /// [`FailureKind::Unreachable`]: libvirt refused the connection, or did not complete the
    /// handshake within 30 seconds.
    pub(super) fn open(uri: &str, listening: Listening, mailbox: &Arc<Mailbox>) -> Result<Self> {
        // libvirt sends and checks keep-alives from its event loop, and only on connections that
        // were opened after the loop was registered. Polling needs the loop for this reason alone.
        if listening != Listening::CallersLoop {
            events::run_loop()?;
        }
        let mut connection = open_in_time(uri)?;
        raw::print_no_errors(&connection.connect);
        let (interval, count) = KEEP_ALIVE;
        match connection.connect.set_keep_alive(interval, count) {
            Ok(_) => {}
            // Drivers within this process, such as `test`, have no peer that could hang.
            Err(error) if error.code() == ErrorNumber::NoSupport => {}
            Err(error) => return Err(unreachable(&error)),
        }
        if listening != Listening::Poll {
            connection.callbacks = raw::register_events(&connection.connect, mailbox).map_err(|error| {
                let message = error.map_or_else(String::new, |error| error.message().to_owned());
                HypervisorError::new(FailureKind::Unreachable, message)
            })?;
        }
        Ok(connection)
    }

    /// Borrows libvirt's handle. The handle must not be cloned, since a clone is never closed.
    pub(super) fn handle(&self) -> &Connect {
        &self.connect
    }

    /// Returns false once the daemon closed the connection or its keep-alives failed.
    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for callback in self.callbacks.drain(..) {
            raw::deregister_event(&self.connect, callback);
        }
        // On a connection that broke this fails after it released the socket: nothing is left to
        // do.
        let _ = self.connect.close();
    }
}

/// Opens a connection on a thread of its own, so that a daemon that accepts and never answers ends
/// in an error. If the limit passes, the thread stays until the daemon answers or dies, and then
/// closes what it opened.
fn open_in_time(uri: &str) -> Result<Connection> {
    let (sender, receiver) = mpsc::channel();
    let address = uri.to_owned();
    let open = move || {
        let opened = Connect::open(Some(&address)).map(|connect| Connection { connect, callbacks: Vec::new() });
        // A receiver that gave up returns the connection, and its drop closes it.
        drop(sender.send(opened));
    };
    events::without_signals(|| std::thread::Builder::new().name("libvirt connect".to_owned()).spawn(open))
        .map_err(|error| HypervisorError::new(FailureKind::Unreachable, format!("cannot start a thread: {error}")))?;
    let Ok(opened) = receiver.recv_timeout(OPEN_LIMIT) else {
        let message = format!("{uri}: libvirt did not answer within {} s", OPEN_LIMIT.as_secs());
        return Err(HypervisorError::new(FailureKind::Unreachable, message));
    };
    opened.map_err(|error| unreachable(&error))
}

/// Converts an error that leaves open if the call had an effect.
pub(super) fn unreachable(error: &Error) -> HypervisorError {
    HypervisorError::new(FailureKind::Unreachable, error.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(listening: Listening) -> (Connection, Arc<Mailbox>) {
        let mailbox = Arc::new(Mailbox::new("test"));
        (Connection::open("test:///default", listening, &mailbox).unwrap(), mailbox)
    }

    /// The callbacks own one reference to the mailbox each. libvirt releases it with the callback,
    /// which holds the connection.
    #[test]
    fn dropped_connection_releases_callbacks() {
        let (connection, mailbox) = open(Listening::OwnLoop);
        assert_eq!((connection.callbacks.len(), Arc::strong_count(&mailbox)), (2, 3));
        drop(connection);
        assert_eq!(Arc::strong_count(&mailbox), 1);
    }

    #[test]
    fn dropped_connection_has_one_reference() {
        for listening in [Listening::OwnLoop, Listening::Poll] {
            let (mut connection, mailbox) = open(listening);
            for callback in connection.callbacks.drain(..) {
                raw::deregister_event(&connection.connect, callback);
            }
            // `virConnectClose` returns the number of references that are left.
            assert_eq!(connection.connect.close().unwrap(), 0, "{listening:?}");
            std::mem::forget(connection);
            drop(mailbox);
        }
    }

    #[test]
    fn polling_connection_registers_no_callbacks() {
        let (connection, mailbox) = open(Listening::Poll);
        assert!(connection.callbacks.is_empty() && connection.is_alive());
        assert_eq!(Arc::strong_count(&mailbox), 1);
    }

    #[test]
    fn unknown_uri_is_unreachable() {
        let mailbox = Arc::new(Mailbox::new("test"));
        let error = Connection::open("nowhere:///", Listening::Poll, &mailbox).unwrap_err();
        assert_eq!(error.kind, FailureKind::Unreachable);
    }
}
