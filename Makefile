# SPDX-License-Identifier: GPL-2.0
#
# For people. What the kernel's build reads is in Kbuild.

KDIR ?= /lib/modules/$(shell uname -r)/build
PREFIX ?= /usr/local
DESTDIR ?=
# The kernel's build is in other directories.
override DESTDIR := $(if $(DESTDIR),$(abspath $(DESTDIR)))
FUZZ_MINUTES ?= 10
SOAK_MINUTES ?= 30
RACES ?= 10000

# The lab, which builds as root and for its own kernel, has build/lab.
BUILD := build
CARGO := cargo
# Static, so that the command runs in any lab host and rescue system. The target
# is named to keep the flags from procedural macros, which cannot be static.
TARGET := x86_64-unknown-linux-gnu
CARGO_FLAGS := --locked --release --manifest-path tools/Cargo.toml --target-dir $(BUILD)/cargo \
	--target $(TARGET)
export RUSTFLAGS := -C target-feature=+crt-static

define help
On a host:
  make                  build module and command for the running kernel
  make KDIR=DIR         ... for another kernel (LLVM=1 if clang built it)
  make install          install both, with man pages and completions
  make uninstall        remove them again (same PREFIX, DESTDIR and KDIR)

Without one, in emulated hosts (needs root, and Debian 12 or 13):
  make demo             see what it does
  make test             run all tests
  make test-debug       run them in kernels that look for mistakes and races, built the first time (hours)
  make fuzz             hostile input, for FUZZ_MINUTES (10)
  make races            what happens at the same time, RACES times (10000) on each side
  make soak             everything at once, for SOAK_MINUTES (30)
  make bench            measure what passing exits through saves, and what the module costs
  make selftests        run the self-tests of Linux's KVM, without and with it
  make lab-build        build module and command for the emulated hosts
  make lab              set the emulated hosts up, and nothing else

For developers:
  make check            formatting and lints
  make clean            remove what was built here
endef

.PHONY: all module command man tests lab lab-build demo test test-debug fuzz races soak bench selftests check install uninstall clean help
all: module command man

help:
	$(info $(help))
	@:

# --- building -----------------------------------------------------------------

# $(call kbuild,SOURCE,NAME) for the modules of a directory. The kernel's build wants none of
# cargo's flags.
kbuild = env -u RUSTFLAGS $(MAKE) M="$(1)" MO="$(CURDIR)/$(BUILD)/$(2)"

define modules
	@set -e; \
	dir=$$(tools/kernel dir "$(KDIR)"); \
	args=$(if $(filter command,$(origin CC)),,$$(tools/kernel make "$$dir")); \
	images=$$(tools/kernel images "$$dir"); \
	mkdir -p $(BUILD)/$(2); \
	$(call kbuild,$(1),$(2)) -C "$$dir" KVM_IMAGES="$$images" $$args modules
endef

module:
	$(call modules,$(CURDIR),module)
	@cp $(BUILD)/module/kvm_exitpolicy.ko $(BUILD)/kvm_exitpolicy.ko
	@tools/kernel sign "$(KDIR)"

command:
	@command -v $(CARGO) >/dev/null || \
		{ echo "error: there is no $(CARGO), which builds the command; Debian: apt install cargo" >&2; exit 1; }
	$(CARGO) build $(CARGO_FLAGS) --package exitpolicy
	@cp $(BUILD)/cargo/$(TARGET)/release/exitpolicy $(BUILD)/exitpolicy

man: command
	@mkdir -p $(BUILD)/man $(BUILD)/completions
	$(CARGO) run $(CARGO_FLAGS) --quiet --package exitpolicy --example man -- $(BUILD)/man
	@for shell in bash zsh fish; do \
		$(BUILD)/exitpolicy completions $$shell > $(BUILD)/completions/$$shell || exit 1; \
	done

tests:
	$(CARGO) build $(CARGO_FLAGS) --package testing --package exitpolicy-bench-report
	@cp $(addprefix $(BUILD)/cargo/$(TARGET)/release/,exitpolicy-vmtest exitpolicy-bench exitpolicy-bench-report kselftests tinyvmm) $(BUILD)/

# The module from headers that are not those of KVM, for the tests: without a field of struct
# kvm_arch, and with one more at the end of struct kvm_vcpu_arch, larger than the gap behind it
# (struct vcpu_vmx has a member that is aligned to 64).
.PHONY: doctored doctored-vm doctored-vcpu
doctored: doctored-vm doctored-vcpu
doctored-vm: export KCPPFLAGS := -Dwall_clock=wall_clock[0]
doctored-vcpu: export KCPPFLAGS := -Dpdptrs_from_userspace=pdptrs_from_userspace,inserted[64]
doctored-vm doctored-vcpu:
	$(call modules,$(CURDIR),$@)
	@strip --strip-debug -o $(BUILD)/$@.ko $(BUILD)/$@/kvm_exitpolicy.ko

# --- in emulated hosts --------------------------------------------------------

lab:
	tools/lab/setup

lab-build: lab
	tools/lab/enter make --no-print-directory BUILD=build/lab \
		KDIR="$$(tools/lab/setup --print kdir)" all tests doctored

demo: lab-build
	tools/demo/run

test: lab-build
	tools/testing/run

# The module for a kernel that the lab has built itself, with clang.
lab-module-%:
	tools/lab/setup --kernel $*
	tools/lab/enter make --no-print-directory BUILD=build/lab-$* LLVM=-19 \
		KDIR="$$(tools/lab/setup --print kdir --kernel $*)" module

test-debug: lab-build lab-module-debug lab-module-kcsan
	tools/testing/run --kernel debug
	tools/testing/run --kernel kcsan --host amd races::

fuzz: lab-build
	FUZZ_MINUTES="$(FUZZ_MINUTES)" tools/testing/fuzz

selftests: lab-build
	tools/lab/setup --selftests
	tools/testing/selftests

races: lab-build lab-module-small
	RACES="$(RACES)" tools/testing/races

soak: lab-build
	SOAK_MINUTES="$(SOAK_MINUTES)" tools/testing/soak

bench: lab-build
	tools/bench/run

check: lab-build
	tools/lab/enter tools/check "$$(tools/lab/setup --print kdir)"

# --- installing ---------------------------------------------------------------

share := $(DESTDIR)$(PREFIX)/share

# modinfo and depmod are where users do not look.
install uninstall: export PATH := $(PATH):/usr/sbin:/sbin

install:
	@test -e $(BUILD)/module/kvm_exitpolicy.ko -a -e $(BUILD)/exitpolicy || \
		{ echo "error: there is nothing to install yet; run: make" >&2; exit 1; }
	@test -e $(BUILD)/man/exitpolicy.1 -a -e $(BUILD)/completions/fish || \
		{ echo "error: there are no manual pages or completions yet; run: make" >&2; exit 1; }
	@for it in "$$(cat "$(KDIR)/include/config/kernel.release")"; do \
		modinfo -F vermagic $(BUILD)/module/kvm_exitpolicy.ko | grep -qF "$$it " || \
		{ echo "error: the module was built for another kernel than $$it; run make with this KDIR" >&2; exit 1; }; \
	done
	$(call kbuild,$(CURDIR),module) -C "$(KDIR)" INSTALL_MOD_PATH="$(DESTDIR)" $(if $(DESTDIR),DEPMOD=true) modules_install
	@# Debian's headers have no System.map, without which the above leaves this out.
	test -n "$(DESTDIR)" || depmod "$$(cat "$(KDIR)/include/config/kernel.release")"
	install -D -m 755 $(BUILD)/exitpolicy $(DESTDIR)$(PREFIX)/bin/exitpolicy
	install -D -m 644 -t $(share)/man/man1 $(BUILD)/man/*.1
	install -D -m 644 $(BUILD)/completions/bash $(share)/bash-completion/completions/exitpolicy
	install -D -m 644 $(BUILD)/completions/zsh $(share)/zsh/site-functions/_exitpolicy
	install -D -m 644 $(BUILD)/completions/fish $(share)/fish/vendor_completions.d/exitpolicy.fish
	install -D -m 644 include/uapi/linux/exitpolicy.h $(DESTDIR)$(PREFIX)/include/linux/exitpolicy.h
	@echo "installed; load it with: modprobe kvm_exitpolicy; see what it can do here with: exitpolicy doctor"

uninstall:
	@set -e; \
	release=$$(cat "$(KDIR)/include/config/kernel.release"); \
	rm -fv $(DESTDIR)/lib/modules/$$release/updates/kvm_exitpolicy.ko*; \
	test -n "$(DESTDIR)" || depmod "$$release"
	rm -fv $(DESTDIR)$(PREFIX)/bin/exitpolicy \
		$(share)/man/man1/exitpolicy.1 $(share)/man/man1/exitpolicy-*.1 \
		$(share)/bash-completion/completions/exitpolicy \
		$(share)/zsh/site-functions/_exitpolicy \
		$(share)/fish/vendor_completions.d/exitpolicy.fish \
		$(DESTDIR)$(PREFIX)/include/linux/exitpolicy.h

clean:
	rm -rf $(BUILD)
