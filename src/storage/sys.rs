//! OWNER: storage
