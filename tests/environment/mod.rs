//! Random surroundings of VMs combined with every operation, with kills, damage and other programs.
//!
//! A case builds a world from a seed: directories, names, owners, links, neighbours. It takes a VM
//! in and lets a random life happen to it. After every operation the oracle holds the files against
//! a model: each snapshot and each volume reads as the model says, no file of anyone else changed,
//! a refused operation changed nothing, no new image is more readable than its source, and every
//! image is sound.
//!
//! `QCOW2_CHAIN_WORLDS` is the number of worlds (200). With `QCOW2_CHAIN_CASE` one world runs
//! alone, and its directory stays if it fails. Foreign owners, other users, devices and a second
//! file system need root; extended attributes need `setfattr`.

mod access;
mod block;
mod damage;
mod devices;
mod directed;
mod images;
mod life;
mod names;
mod neighbours;
mod operations;
mod oracle;
mod program;
mod recipe;
mod table;
mod world;

use self::life::live;
use self::table::Table;
use self::world::Grounds;
use crate::support::rng::{cases, count};

#[test]
fn random_worlds_lose_no_byte() {
    let Some(grounds) = Grounds::with_second_file_system() else { return };
    let worlds = count("QCOW2_CHAIN_WORLDS", 200);
    let table = Table::default();
    cases("worlds", worlds, |rng| live(&grounds, &table, rng));
    table.print();
    if worlds >= 200 && std::env::var_os("QCOW2_CHAIN_CASE").is_none() {
        table.assert_covered();
    }
}
