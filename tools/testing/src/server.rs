// SPDX-License-Identifier: GPL-2.0

//! The VMM as a process of its own, told what to do line by line.
//!
//! A policy looks at the cgroup of the process that creates the first vCPU, so the VMM cannot be
//! the test itself. [`crate::client`] is the other end.

use std::{
    collections::HashMap,
    io::{
        self,
        BufRead,
        Write, //
    },
    os::fd::AsRawFd,
    sync::{
        atomic::{
            AtomicBool,
            Ordering, //
        },
        mpsc::{
            self,
            Receiver,
            RecvTimeoutError,
            Sender, //
        },
        Arc,
        Barrier, //
    },
    thread,
    time::Duration, //
};

use anyhow::{
    anyhow,
    bail,
    ensure,
    Context,
    Result, //
};
use nix::{
    sched::{
        sched_setaffinity,
        CpuSet, //
    },
    sys::{
        pthread::{
            pthread_kill,
            pthread_self,
            Pthread, //
        },
        resource::{
            getrlimit,
            setrlimit,
            Resource, //
        },
        signal::{
            sigaction,
            SaFlags,
            SigAction,
            SigHandler,
            SigSet,
            Signal, //
        }, //
    },
    unistd::{
        gettid,
        Pid, //
    }, //
};
use serde::{
    Deserialize,
    Serialize, //
};

use crate::{
    timed,
    vmm::{
        Action,
        Irqchip,
        Report,
        Vcpu,
        Vm,
        Work, //
    }, //
};

/// What the VMM is told. VMs, threads and vCPUs are named by number; a vCPU has the number of its
/// thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// KVM_CREATE_VM and what belongs to it. Answered by [`Answer::Number`].
    CreateVm { irqchip: Irqchip },
    /// KVM_CREATE_VM, and the memory of another VM. Answered by [`Answer::Number`].
    CreateTwin { vm: usize },
    /// The file of a VM's memory. Answered by [`Answer::Number`].
    Memory { vm: usize },
    /// Guests are not told of KVM_FEATURE_PV_UNHALT.
    HidePvUnhalt { vm: usize },
    /// KVM_X86_SET_MSR_FILTER.
    DenyMsrReads { vm: usize, base: u32, count: u32 },
    /// KVM_ENABLE_CAP(KVM_CAP_X86_DISABLE_EXITS).
    DisableExits { vm: usize, bits: u64 },
    /// A new thread, for one vCPU. Answered by [`Answer::Thread`].
    Thread,
    /// KVM_CREATE_VCPU in these threads, all at once; each is a thread, a VM and the vCPU's id.
    /// Answered by [`Answer::Outcomes`].
    CreateVcpus(Vec<(usize, usize, usize)>),
    /// KVM_CREATE_VCPU that fails with EMFILE, at its very end. Answered by [`Answer::Outcomes`].
    CreateVcpuWithoutFile {
        thread: usize,
        vm: usize,
        index: usize,
    },
    /// Runs a vCPU to the end of its work. Answered by [`Answer::Report`].
    Run { vcpu: usize, work: Work },
    /// Runs a vCPU in the background.
    Start { vcpu: usize, work: Work },
    /// How far a vCPU is that runs in the background. Answered by [`Answer::Number`].
    Progress { vcpu: usize },
    /// Stops a vCPU that runs in the background. Answered by [`Answer::Report`].
    Stop { vcpu: usize },
    /// Waits for the end of a run in the background. Answered by [`Answer::Report`].
    Wait { vcpu: usize },
    /// Whether a run in the background has ended: 1 or 0. Answered by [`Answer::Number`].
    Ended { vcpu: usize },
    /// Takes a vCPU that runs in the background out of KVM_RUN, wherever its guest is. Answered by
    /// [`Answer::Report`].
    Leave { vcpu: usize },
    /// Runs a vCPU in the background, from where it is.
    GoOn { vcpu: usize },
    /// Does something to a vCPU that does not run.
    Act { vcpu: usize, action: Action },
    /// Makes a vCPU begin some work when it runs.
    Prepare { vcpu: usize, work: Work },
    /// Makes a vCPU measure when it runs, with another one of the VM, by its index.
    PrepareTimed {
        vcpu: usize,
        work: timed::Work,
        peer: usize,
    },
    /// How fast a vCPU's TSC is, in kHz. Answered by [`Answer::Number`].
    TscKhz { vcpu: usize },
    /// Keeps a thread on one CPU.
    Pin { thread: usize, cpu: usize },
    /// Where a vCPU is that does not run. Answered by [`Answer::Text`].
    Describe { vcpu: usize },
    /// Makes one vCPU go on where another one was; both do not run.
    Migrate { from: usize, to: usize },
    /// Closes a VM and its vCPUs.
    Close { vm: usize },
    /// Forks, with all file descriptors inherited. The child tries KVM_CREATE_VCPU and
    /// KVM_ENABLE_CAP on the VM, and lives as long as this process does. Answered by
    /// [`Answer::Fork`].
    Fork { vm: usize },
}

/// What the VMM answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Number(usize),
    Thread {
        thread: usize,
        tid: i32,
    },
    /// The errno of each KVM_CREATE_VCPU, or 0.
    Outcomes(Vec<i32>),
    Report(Report),
    Text(String),
    Fork {
        child: i32,
        create_vcpu: i32,
        enable_cap: i32,
    },
    /// The request failed. The errno is 0 if the failure was none of the kernel's.
    Failed {
        errno: i32,
        message: String,
    },
}

/// How often a vCPU is looked at, and how many looks without progress make a lost guest. In an
/// emulated host a second of its time is little work, so a minute of them is plenty only for a
/// guest that makes none at all.
const LOOK: Duration = Duration::from_millis(200);
const LOOKS: u32 = 300;

/// Something that a thread does with its vCPU.
type Job = Box<dyn FnOnce(&mut Option<Vcpu>) + Send>;

struct VcpuThread {
    jobs: Sender<Job>,
    pthread: Pthread,
    tid: Pid,
    give_up: Arc<AtomicBool>,
    /// The VM and the vCPU's id in it.
    vcpu: Option<(usize, usize)>,
    /// The end of a run in the background.
    running: Option<Receiver<Result<Report>>>,
    /// Whether it has come.
    ended: Arc<AtomicBool>,
}

#[derive(Default)]
struct Server {
    vms: HashMap<usize, Arc<Vm>>,
    threads: Vec<VcpuThread>,
    created: usize,
}

/// Serves standard input until its end.
pub fn serve() -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: The handler does nothing. Its only use is that KVM_RUN returns with EINTR.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;

    let mut server = Server::default();
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?)?;
        let answer = server.handle(request).unwrap_or_else(|error| {
            let errno = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::raw_os_error);
            Answer::Failed {
                errno: errno.unwrap_or(0),
                message: format!("{error:#}"),
            }
        });
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    Ok(())
}

impl Server {
    fn handle(&mut self, request: Request) -> Result<Answer> {
        match request {
            Request::CreateVm { irqchip } => {
                self.created += 1;
                self.vms.insert(self.created, Arc::new(Vm::new(irqchip)?));
                Ok(Answer::Number(self.created))
            }
            Request::CreateTwin { vm } => {
                let twin = self.vm(vm)?.twin()?;
                self.created += 1;
                self.vms.insert(self.created, Arc::new(twin));
                Ok(Answer::Number(self.created))
            }
            Request::Memory { vm } => Ok(Answer::Number(self.vm(vm)?.memory().try_into()?)),
            Request::HidePvUnhalt { vm } => {
                self.vm(vm)?.hide_pv_unhalt();
                Ok(Answer::Done)
            }
            Request::DenyMsrReads { vm, base, count } => {
                self.vm(vm)?.deny_msr_reads(base, count)?;
                Ok(Answer::Done)
            }
            Request::DisableExits { vm, bits } => {
                self.vm(vm)?.disable_exits(bits)?;
                Ok(Answer::Done)
            }
            Request::Thread => self.spawn(),
            Request::CreateVcpus(vcpus) => self.create_vcpus(vcpus),
            Request::CreateVcpuWithoutFile { thread, vm, index } => {
                let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
                let soft = lowest_free_fd()?;
                setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
                let answer = self.create_vcpus(vec![(thread, vm, index)]);
                setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
                answer
            }
            Request::Run { vcpu, work } => {
                self.start(vcpu, work)?;
                self.wait(vcpu, false)
            }
            Request::Start { vcpu, work } => {
                self.start(vcpu, work)?;
                Ok(Answer::Done)
            }
            Request::Progress { vcpu } => Ok(Answer::Number(self.progress(vcpu)? as usize)),
            Request::Stop { vcpu } => self.wait(vcpu, true),
            Request::Wait { vcpu } => self.wait(vcpu, false),
            Request::Ended { vcpu } => {
                let thread = self.thread(vcpu)?;
                Ok(Answer::Number(thread.ended.load(Ordering::Acquire).into()))
            }
            Request::Leave { vcpu } => {
                let hear = self.taken(vcpu)?;
                self.give_up(vcpu, &hear)
            }
            Request::GoOn { vcpu } => {
                self.go_on(vcpu)?;
                Ok(Answer::Done)
            }
            Request::Act { vcpu, action } => {
                self.with_vcpu(vcpu, move |vcpu| vcpu.act(action))?;
                Ok(Answer::Done)
            }
            Request::Prepare { vcpu, work } => {
                self.with_vcpu(vcpu, move |vcpu| {
                    vcpu.keep_fresh()?;
                    vcpu.prepare(work)
                })?;
                Ok(Answer::Done)
            }
            Request::PrepareTimed { vcpu, work, peer } => {
                self.with_vcpu(vcpu, move |vcpu| vcpu.prepare_timed(work, peer))?;
                Ok(Answer::Done)
            }
            Request::TscKhz { vcpu } => {
                let khz = self.with_vcpu(vcpu, |vcpu| vcpu.tsc_khz())?;
                Ok(Answer::Number(khz.try_into()?))
            }
            Request::Pin { thread, cpu } => {
                let mut cpus = CpuSet::new();
                cpus.set(cpu)?;
                sched_setaffinity(self.thread(thread)?.tid, &cpus)?;
                Ok(Answer::Done)
            }
            Request::Describe { vcpu } => Ok(Answer::Text(self.with_vcpu(vcpu, Vcpu::describe)?)),
            Request::Migrate { from, to } => {
                let state = self.with_vcpu(from, Vcpu::save)?;
                self.with_vcpu(to, move |vcpu| vcpu.restore(&state))?;
                Ok(Answer::Done)
            }
            Request::Close { vm } => self.close(vm),
            Request::Fork { vm } => self.fork(vm),
        }
    }

    fn vm(&self, number: usize) -> Result<&Arc<Vm>> {
        self.vms.get(&number).context("no such VM")
    }

    fn thread(&self, number: usize) -> Result<&VcpuThread> {
        self.threads.get(number).context("no such thread")
    }

    fn spawn(&mut self) -> Result<Answer> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (say, hear) = mpsc::channel();
        thread::Builder::new().name("vcpu".into()).spawn(move || {
            let _ = say.send((gettid(), pthread_self()));
            let mut vcpu = None;
            for job in queue {
                job(&mut vcpu);
            }
        })?;
        let (tid, pthread) = hear.recv()?;
        self.threads.push(VcpuThread {
            jobs,
            pthread,
            tid,
            give_up: Arc::new(AtomicBool::new(false)),
            vcpu: None,
            running: None,
            ended: Arc::new(AtomicBool::new(false)),
        });
        Ok(Answer::Thread {
            thread: self.threads.len() - 1,
            tid: tid.as_raw(),
        })
    }

    fn create_vcpus(&mut self, vcpus: Vec<(usize, usize, usize)>) -> Result<Answer> {
        let barrier = Arc::new(Barrier::new(vcpus.len()));
        let mut outcomes = Vec::new();
        for &(thread, vm, index) in &vcpus {
            let (say, hear) = mpsc::channel();
            let vm = self.vm(vm)?.clone();
            let barrier = barrier.clone();
            let job: Job = Box::new(move |slot| {
                barrier.wait();
                let outcome = vm.create_vcpu(index).map(|vcpu| *slot = Some(vcpu));
                let _ = say.send(outcome);
            });
            self.thread(thread)?.jobs.send(job).map_err(lost)?;
            outcomes.push(hear);
        }
        let mut errnos = Vec::new();
        for (hear, (thread, vm, index)) in outcomes.into_iter().zip(vcpus) {
            errnos.push(match hear.recv()? {
                Ok(()) => {
                    self.threads[thread].vcpu = Some((vm, index));
                    0
                }
                Err(error) => error.raw_os_error().context("not the kernel's error")?,
            });
        }
        Ok(Answer::Outcomes(errnos))
    }

    /// When it returns, the guest is prepared, so that its gate may be opened.
    fn start(&mut self, number: usize, work: Work) -> Result<()> {
        self.with_vcpu(number, move |vcpu| {
            vcpu.keep_fresh()?;
            vcpu.prepare(work)
        })?;
        self.go_on(number)
    }

    fn go_on(&mut self, number: usize) -> Result<()> {
        let (say, hear) = mpsc::channel();
        let thread = self.threads.get_mut(number).context("no such thread")?;
        thread.give_up.store(false, Ordering::Release);
        thread.ended.store(false, Ordering::Release);
        let (give_up, ended) = (thread.give_up.clone(), thread.ended.clone());
        let job: Job = Box::new(move |slot| {
            let report = match slot {
                Some(vcpu) => vcpu.go_on(&give_up),
                None => Err(anyhow!("the thread has no vCPU")),
            };
            let _ = say.send(report);
            ended.store(true, Ordering::Release);
        });
        thread.jobs.send(job).map_err(lost)?;
        thread.running = Some(hear);
        Ok(())
    }

    /// Does something to a vCPU, in its thread.
    fn with_vcpu<T: Send + 'static>(
        &self,
        number: usize,
        what: impl FnOnce(&mut Vcpu) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let thread = self.thread(number)?;
        ensure!(thread.running.is_none(), "the vCPU runs");
        let (say, hear) = mpsc::channel();
        let job: Job = Box::new(move |slot| {
            let result = match slot {
                Some(vcpu) => what(vcpu),
                None => Err(anyhow!("the thread has no vCPU")),
            };
            let _ = say.send(result);
        });
        thread.jobs.send(job).map_err(lost)?;
        hear.recv()?
    }

    /// The end of a run in the background, which is taken as over from here on.
    fn taken(&mut self, number: usize) -> Result<Receiver<Result<Report>>> {
        let thread = self.threads.get_mut(number).context("no such thread")?;
        thread.running.take().context("the vCPU does not run")
    }

    fn progress(&self, number: usize) -> Result<u32> {
        let (vm, index) = self
            .thread(number)?
            .vcpu
            .context("the thread has no vCPU")?;
        Ok(Vcpu::progress(self.vm(vm)?, index))
    }

    /// Waits for the end of a run. Asks for it, if `stop`, and gives up on a guest that makes no
    /// progress.
    fn wait(&mut self, number: usize, stop: bool) -> Result<Answer> {
        let hear = self.taken(number)?;
        let thread = self.thread(number)?;
        let (mut before, mut looks) = (None, 0);
        while looks < LOOKS {
            if stop {
                let (vm, index) = thread.vcpu.context("the thread has no vCPU")?;
                Vcpu::ask_to_stop(self.vm(vm)?, index);
            }
            match hear.recv_timeout(LOOK) {
                Ok(report) => return Ok(Answer::Report(report?)),
                Err(RecvTimeoutError::Disconnected) => bail!("the vCPU's thread died"),
                Err(RecvTimeoutError::Timeout) => {
                    let now = self.progress(number).ok();
                    looks = if now == before { looks + 1 } else { 0 };
                    before = now;
                }
            }
        }
        self.give_up(number, &hear)
    }

    /// Makes KVM_RUN return.
    fn give_up(&self, number: usize, hear: &Receiver<Result<Report>>) -> Result<Answer> {
        let thread = self.thread(number)?;
        loop {
            // Again and again: a signal that comes before KVM_RUN interrupts nothing.
            thread.give_up.store(true, Ordering::Release);
            pthread_kill(thread.pthread, Signal::SIGUSR1)?;
            match hear.recv_timeout(LOOK) {
                Ok(report) => return Ok(Answer::Report(report?)),
                Err(RecvTimeoutError::Disconnected) => bail!("the vCPU's thread died"),
                Err(RecvTimeoutError::Timeout) => (),
            }
        }
    }

    fn close(&mut self, number: usize) -> Result<Answer> {
        for thread in &mut self.threads {
            if thread.vcpu.take_if(|(vm, _)| *vm == number).is_some() {
                let (say, hear) = mpsc::channel();
                let job: Job = Box::new(move |slot| {
                    *slot = None;
                    let _ = say.send(());
                });
                thread.jobs.send(job).map_err(lost)?;
                hear.recv()?;
            }
        }
        self.vms.remove(&number).context("no such VM")?;
        Ok(Answer::Done)
    }

    fn fork(&mut self, number: usize) -> Result<Answer> {
        nix::ioctl_write_int_bad!(kvm_create_vcpu, nix::request_code_none!(0xAE, 0x41));
        nix::ioctl_write_ptr!(kvm_enable_cap, 0xAE, 0xa3, kvm_bindings::kvm_enable_cap);

        let vm = self.vm(number)?.as_raw_fd();
        let mut cap = kvm_bindings::kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_X86_DISABLE_EXITS,
            ..Default::default()
        };
        cap.args[0] = u64::from(kvm_bindings::KVM_X86_DISABLE_EXITS_HLT);
        let (answers, question) = nix::unistd::pipe()?;
        // SAFETY: The child of a process with threads may only make system calls, and does.
        let child = match unsafe { nix::unistd::fork() }? {
            nix::unistd::ForkResult::Parent { child } => child,
            nix::unistd::ForkResult::Child => {
                // SAFETY: A plain system call; dies with the parent, so that none is left behind.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                let errno = |result: nix::Result<i32>| result.err().map_or(0, |e| e as i32);
                // SAFETY: An open VM's file; the command takes a number.
                let create_vcpu = errno(unsafe { kvm_create_vcpu(vm, 63) });
                // SAFETY: An open VM's file, and the structure that the command reads.
                let enable_cap = errno(unsafe { kvm_enable_cap(vm, &cap) });
                let mut message = [0; 8];
                message[..4].copy_from_slice(&create_vcpu.to_ne_bytes());
                message[4..].copy_from_slice(&enable_cap.to_ne_bytes());
                let _ = nix::unistd::write(&question, &message);
                loop {
                    nix::unistd::pause();
                }
            }
        };
        let mut message = [0; 8];
        let length = nix::unistd::read(&answers, &mut message)?;
        if length != message.len() {
            bail!("the forked child told only {length} bytes");
        }
        Ok(Answer::Fork {
            child: child.as_raw(),
            create_vcpu: i32::from_ne_bytes(message[..4].try_into()?),
            enable_cap: i32::from_ne_bytes(message[4..].try_into()?),
        })
    }
}

/// A channel's error holds the message, which cannot be shared.
fn lost<T>(_: mpsc::SendError<T>) -> anyhow::Error {
    anyhow!("the vCPU's thread died")
}

/// With this as the limit, no file can be opened.
fn lowest_free_fd() -> Result<u64> {
    let probe = std::fs::File::open("/dev/null")?;
    Ok(probe.as_raw_fd().try_into()?)
}
