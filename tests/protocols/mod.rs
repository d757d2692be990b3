//! The operations that change files, as protocols of which every crash, every barrier and every fault is looked at.

mod convert;
mod create;
mod header;
mod merge;
mod rebase;
mod repair;
mod resize;
mod writer;

pub use convert::Convert;
pub use create::Create;
pub use header::HeaderChange;
pub use merge::Merging;
pub use rebase::Rebase;
pub use repair::Repair;
pub use resize::Resize;
pub use writer::Writer;
