// SPDX-License-Identifier: GPL-2.0

//! KVM without the module: the test of the tests. What they count as trapped is trapped, and what
//! they count as passed through is passed through, by KVM's own means.

use anyhow::Result;
use exitpolicy_policy::Exits;
use testing::{
    cgroup::Cgroup,
    client::Vmm,
    exits::Vendor,
    modules::Unloaded,
    payload::Payload, //
};

use crate::{
    matrix::{
        check_guest,
        floor,
        supported, //
    },
    Test, //
};

pub fn tests(vendor: Vendor) -> Result<Vec<Test>> {
    let supported = supported(vendor)?;
    let tests = Payload::EXITS.into_iter().map(|payload| {
        let exit = payload.exit();
        Test::new(format!("stock::{exit}"), move || check(vendor, payload))
            .stock()
            .ignored(!supported.contains(exit))
    });
    Ok(tests.collect())
}

fn check(vendor: Vendor, payload: Payload) -> Result<()> {
    let _unloaded = Unloaded::new()?;
    let cgroup = Cgroup::new("stock")?;
    for requested in [Exits::NONE, payload.exit()] {
        let mut vmm = Vmm::start(&cgroup)?;
        let vm = vmm.create_vm()?;
        if !requested.is_empty() {
            vmm.disable_exits(vm, requested)?;
        }
        let vcpu = vmm.create_vcpu(vm, 0)?;
        check_guest(vendor, &mut vmm, vcpu, payload, floor(vendor)? | requested)?;
    }
    Ok(())
}
