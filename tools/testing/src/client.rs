// SPDX-License-Identifier: GPL-2.0

//! The test's end of a VMM process ([`crate::server`]).

use std::{
    io::{
        self,
        BufRead,
        BufReader,
        Write, //
    },
    os::{
        fd::{
            AsRawFd,
            FromRawFd,
            OwnedFd,
            RawFd, //
        },
        unix::process::ExitStatusExt, //
    },
    process::{
        Child,
        ChildStdout,
        Command,
        Stdio, //
    }, //
};

use anyhow::{
    bail,
    ensure,
    Context,
    Result, //
};
use exitpolicy_policy::Exits;

use crate::{
    cgroup::Cgroup,
    exits::Counter,
    payload::Payload,
    server::{
        Answer,
        Request, //
    },
    timed,
    vmm::{
        ensure_complete,
        Action,
        Guest,
        Irqchip,
        Report,
        Work, //
    }, //
};

/// The argument that makes the test program a VMM.
pub const SERVE: &str = "--serve-as-vmm";

/// A VMM process. It dies with the value.
pub struct Vmm {
    child: Child,
    answers: BufReader<ChildStdout>,
}

/// A thread of a VMM, and the vCPU in it once there is one.
#[derive(Clone, Copy, Debug)]
pub struct Thread {
    pub number: usize,
    pub tid: i32,
}

impl Vmm {
    /// Starts a VMM in `cgroup`.
    pub fn start(cgroup: &Cgroup) -> Result<Self> {
        let vmm = Self::start_here()?;
        cgroup.add_process(vmm.pid())?;
        Ok(vmm)
    }

    /// Starts a VMM in the cgroup of the test.
    pub fn start_here() -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(SERVE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a VMM")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self { child, answers })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Asks, and takes the answer as it comes. `Err` means that the VMM is in trouble.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.send(request)?;
        self.receive()
    }

    /// Asks without waiting for an answer.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let requests = self.child.stdin.as_mut().context("no pipe")?;
        writeln!(requests, "{}", serde_json::to_string(request)?)?;
        Ok(requests.flush()?)
    }

    /// The answer to what was asked with [`Vmm::send`].
    pub fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the VMM is gone");
        Ok(serde_json::from_str(&line)?)
    }

    /// Asks for something that must work.
    fn expect(&mut self, request: &Request) -> Result<Answer> {
        match self.ask(request)? {
            Answer::Failed { errno: 0, message } => bail!("{request:?}: {message}"),
            Answer::Failed { errno, message } => {
                Err(io::Error::from_raw_os_error(errno)).context(format!("{request:?}: {message}"))
            }
            answer => Ok(answer),
        }
    }

    /// KVM_CREATE_VM, with all that KVM emulates of the interrupt controllers.
    pub fn create_vm(&mut self) -> Result<usize> {
        self.create_vm_with(Irqchip::Kernel)
    }

    /// KVM_CREATE_VM.
    pub fn create_vm_with(&mut self, irqchip: Irqchip) -> Result<usize> {
        match self.expect(&Request::CreateVm { irqchip })? {
            Answer::Number(vm) => Ok(vm),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// KVM_CREATE_VM, and the memory of another VM.
    pub fn create_twin(&mut self, vm: usize) -> Result<usize> {
        match self.expect(&Request::CreateTwin { vm })? {
            Answer::Number(vm) => Ok(vm),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// The memory of a VM.
    pub fn guest(&mut self, vm: usize) -> Result<Guest> {
        match self.expect(&Request::Memory { vm })? {
            Answer::Number(fd) => Guest::of_process(self.pid(), fd.try_into()?),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Guests are not told of KVM_FEATURE_PV_UNHALT.
    pub fn hide_pv_unhalt(&mut self, vm: usize) -> Result<()> {
        self.expect(&Request::HidePvUnhalt { vm }).map(drop)
    }

    /// KVM_X86_SET_MSR_FILTER: reads of `count` MSRs from `base` on fault.
    pub fn deny_msr_reads(&mut self, vm: usize, base: u32, count: u32) -> Result<()> {
        let request = Request::DenyMsrReads { vm, base, count };
        self.expect(&request).map(drop)
    }

    /// KVM_ENABLE_CAP(KVM_CAP_X86_DISABLE_EXITS).
    pub fn disable_exits(&mut self, vm: usize, exits: Exits) -> Result<()> {
        let bits = exits.bits();
        self.expect(&Request::DisableExits { vm, bits }).map(drop)
    }

    /// A new thread.
    pub fn thread(&mut self) -> Result<Thread> {
        match self.expect(&Request::Thread)? {
            Answer::Thread { thread, tid } => Ok(Thread {
                number: thread,
                tid,
            }),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// KVM_CREATE_VCPU in a new thread.
    pub fn create_vcpu(&mut self, vm: usize, index: usize) -> Result<Thread> {
        let thread = self.thread()?;
        self.create_vcpus(&[(thread, vm, index)])?;
        Ok(thread)
    }

    /// KVM_CREATE_VCPU in several threads at once.
    pub fn create_vcpus(&mut self, vcpus: &[(Thread, usize, usize)]) -> Result<()> {
        let vcpus = vcpus.iter().map(|(t, vm, index)| (t.number, *vm, *index));
        let request = Request::CreateVcpus(vcpus.collect());
        match self.expect(&request)? {
            Answer::Outcomes(errnos) => match errnos.iter().find(|errno| **errno != 0) {
                None => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(*errno)).context("KVM_CREATE_VCPU"),
            },
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// KVM_CREATE_VCPU that fails after the vendor module made the vCPU. Gives the errno.
    pub fn fail_to_create_vcpu(&mut self, thread: Thread, vm: usize, index: usize) -> Result<i32> {
        let thread = thread.number;
        match self.expect(&Request::CreateVcpuWithoutFile { thread, vm, index })? {
            Answer::Outcomes(errnos) => Ok(errnos[0]),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Runs a vCPU to the end of its work.
    pub fn run(&mut self, vcpu: Thread, work: Work) -> Result<Report> {
        let vcpu = vcpu.number;
        let report = self.report(&Request::Run { vcpu, work })?;
        ensure_complete(work, &report)?;
        Ok(report)
    }

    /// Runs a vCPU to the end of `count` executions, and counts the exits that this took.
    pub fn count(&mut self, vcpu: Thread, payload: Payload, count: u32) -> Result<Counted> {
        let counter = Counter::start(vcpu.tid)?;
        let report = self.run(vcpu, Work::new(payload, count))?;
        let exits = counter.finish()?;
        Ok(Counted { report, exits })
    }

    /// Runs a vCPU in the background.
    pub fn start_run(&mut self, vcpu: Thread, work: Work) -> Result<()> {
        let vcpu = vcpu.number;
        self.expect(&Request::Start { vcpu, work }).map(drop)
    }

    /// Executions of a vCPU that runs in the background.
    pub fn progress(&mut self, vcpu: Thread) -> Result<usize> {
        let vcpu = vcpu.number;
        match self.expect(&Request::Progress { vcpu })? {
            Answer::Number(executed) => Ok(executed),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Stops a vCPU that runs in the background. Fails if its guest is stuck.
    pub fn stop(&mut self, vcpu: Thread) -> Result<Report> {
        let vcpu = vcpu.number;
        self.ended_well(&Request::Stop { vcpu })
    }

    /// Waits for the end of a run in the background. Fails if its guest is stuck.
    pub fn wait(&mut self, vcpu: Thread) -> Result<Report> {
        let vcpu = vcpu.number;
        self.ended_well(&Request::Wait { vcpu })
    }

    fn ended_well(&mut self, request: &Request) -> Result<Report> {
        let report = self.report(request)?;
        ensure!(
            report.stuck_at.is_none(),
            "the guest is stuck, {request:?}: {report:?}"
        );
        Ok(report)
    }

    /// Whether a run in the background has ended, so that waiting for it takes no time.
    pub fn ended(&mut self, vcpu: Thread) -> Result<bool> {
        let vcpu = vcpu.number;
        match self.expect(&Request::Ended { vcpu })? {
            Answer::Number(ended) => Ok(ended != 0),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Takes a vCPU that runs in the background out of KVM_RUN, wherever its guest is.
    pub fn leave(&mut self, vcpu: Thread) -> Result<Report> {
        let vcpu = vcpu.number;
        self.report(&Request::Leave { vcpu })
    }

    /// Runs a vCPU in the background, from where it is.
    pub fn go_on(&mut self, vcpu: Thread) -> Result<()> {
        let vcpu = vcpu.number;
        self.expect(&Request::GoOn { vcpu }).map(drop)
    }

    /// Does something to a vCPU that does not run.
    pub fn act(&mut self, vcpu: Thread, action: Action) -> Result<()> {
        let vcpu = vcpu.number;
        self.expect(&Request::Act { vcpu, action }).map(drop)
    }

    /// Takes a vCPU that runs in the background out of KVM_RUN, and says where its guest was.
    pub fn look_at(&mut self, vcpu: Thread) -> Result<String> {
        self.leave(vcpu)?;
        let vcpu = vcpu.number;
        match self.expect(&Request::Describe { vcpu })? {
            Answer::Text(text) => Ok(text),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Makes a vCPU begin some work when it runs.
    pub fn prepare(&mut self, vcpu: Thread, work: Work) -> Result<()> {
        let vcpu = vcpu.number;
        self.expect(&Request::Prepare { vcpu, work }).map(drop)
    }

    /// Makes a vCPU measure when it runs, with another one of the VM, by its index.
    pub fn prepare_timed(&mut self, vcpu: Thread, work: timed::Work, peer: usize) -> Result<()> {
        let vcpu = vcpu.number;
        self.expect(&Request::PrepareTimed { vcpu, work, peer })
            .map(drop)
    }

    /// How fast a vCPU's TSC is, in kHz.
    pub fn tsc_khz(&mut self, vcpu: Thread) -> Result<u32> {
        let vcpu = vcpu.number;
        match self.expect(&Request::TscKhz { vcpu })? {
            Answer::Number(khz) => Ok(khz.try_into()?),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Keeps a thread on one CPU.
    pub fn pin(&mut self, thread: Thread, cpu: usize) -> Result<()> {
        let thread = thread.number;
        self.expect(&Request::Pin { thread, cpu }).map(drop)
    }

    /// Makes one vCPU go on where another one was.
    pub fn migrate(&mut self, from: Thread, to: Thread) -> Result<()> {
        let (from, to) = (from.number, to.number);
        self.expect(&Request::Migrate { from, to }).map(drop)
    }

    fn report(&mut self, request: &Request) -> Result<Report> {
        match self.expect(request)? {
            Answer::Report(report) => Ok(report),
            other => bail!("not an answer: {other:?}"),
        }
    }

    /// Closes a VM and its vCPUs.
    pub fn close(&mut self, vm: usize) -> Result<()> {
        self.expect(&Request::Close { vm }).map(drop)
    }

    /// Has the VMM exit by itself, whatever its vCPUs do: its input ends.
    pub fn end(mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(
            status.success(),
            "the VMM did not exit as it should: {status}"
        );
        Ok(())
    }

    /// Kills the VMM, in the middle of whatever it does.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        ensure!(
            status.signal() == Some(libc::SIGKILL),
            "the VMM ended by itself: {status}"
        );
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run, and the exits that it took.
#[derive(Debug)]
pub struct Counted {
    pub report: Report,
    pub exits: crate::exits::Counts,
}

/// A file that another process has open, as `pidfd_getfd(2)` gives it.
pub fn file_of(pid: i32, fd: RawFd) -> Result<OwnedFd> {
    let open = |call, a: RawFd, b: RawFd| -> Result<OwnedFd> {
        // SAFETY: Neither call takes a pointer.
        let result = unsafe { libc::syscall(call, a, b, 0) };
        ensure!(result >= 0, "{}", io::Error::last_os_error());
        // SAFETY: Both return a descriptor that nobody else has.
        Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
    };
    let process = open(libc::SYS_pidfd_open, pid, 0).context("pidfd_open")?;
    open(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd).context("pidfd_getfd")
}
