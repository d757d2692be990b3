//! The acceptance table's rows on a running guest.

use std::sync::Arc;

use qcow2_chain::libvirt::{Libvirt, Listening};
use qcow2_chain::live::Live;
use qcow2_chain::vm::Executor;

use crate::hypervisor::Hypervisor;
use crate::scene::Scene;

pub const TARGETS: [&str; 3] = ["vda", "vdb", "vdc"];

pub fn live(hypervisor: &Hypervisor, domain: &str) -> Arc<dyn Executor> {
    let libvirt = Libvirt::connect(&*hypervisor.uri, domain, Listening::default()).unwrap();
    Arc::new(Live::new(Arc::new(libvirt)))
}

#[test]
fn c1_c2_r1_r2_d1_d2_d3() {
    let Some(hypervisor) = Hypervisor::get() else { return };
    let mut scene = Scene::start(&hypervisor, "live-basic", &TARGETS, live);
    scene.create("s1", false);
    scene.check("s1(R*)=f0; f1<-f0");
    scene.create("s2", true);
    scene.check("s1(R)=f0, s2(R*)=f1<-f0; f2<-f1");
    let refused = scene.revert_stopped("s1").unwrap_err();
    assert!(refused.to_string().contains("running"), "{refused}");
    scene.check("s1(R)=f0, s2(R*)=f1<-f0; f2<-f1");
    scene.revert("s1");
    scene.check("s1(R*)=f0, s2(R)=f1<-f0; f3<-f0");
    scene.create("s3", true);
    scene.delete("s1");
    scene.check("s1(H)=f0, s2(R)=f1<-f0, s3(R*)=f3<-f0; f4<-f3");
    scene.delete("s2");
    scene.check("s3(R*)=f0; f4<-f0");
    scene.delete("s3");
    scene.check("f0");
    scene.end();
}
