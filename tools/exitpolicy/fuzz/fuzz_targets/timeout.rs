// SPDX-License-Identifier: GPL-2.0

//! How long to wait.

#![no_main]

use exitpolicy::live::Timeout;
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

fuzz_target!(|text: &str| {
    let Ok(timeout) = text.parse::<Timeout>() else {
        return;
    };
    let duration = timeout.duration();
    // 0 would be the module's own idea, and more it does not take.
    assert!(
        duration >= Duration::from_millis(1) && timeout <= Timeout::MAX,
        "{text:?}"
    );
    assert_eq!(timeout.to_string().parse(), Ok(timeout), "{text:?}");
    assert_eq!(Timeout::at_most(duration), timeout, "{text:?}");
});
