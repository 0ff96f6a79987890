// SPDX-License-Identifier: GPL-2.0

//! Sets of exits, which the module reads with the same code.

#![no_main]

use exitpolicy::policy::Exits;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(exits) = text.parse::<Exits>() else {
        return;
    };
    assert_eq!(exits.to_string().parse(), Ok(exits));
    assert_eq!(Exits::from_bits(exits.bits()), Some(exits));
    // There is no set without a word for it, and none is made of words that are not there.
    let words = text.split(',').map(str::trim);
    let known = |word: &str| {
        ["all", "none"].contains(&word) || Exits::NAMES.iter().any(|(_, name)| *name == word)
    };
    assert!(words.into_iter().all(known), "{text:?}");
});
