//! vhost-user messages of one front-end, handed to the control thread's state. What each does is in `control.rs`.
//!
//! `vhost` parses and checks the messages and answers them. An error here ends the session: the front-end asked for
//! something that cannot be, and nothing that it says afterwards could be trusted to mean what it says.

use crate::core::Core;
use crate::memory::{DeviceMemory, RegionInfo};
use crate::port::SessionId;
use crate::session::PROTOCOL_FEATURES;
use dmbridge_proto::{MAX_QUEUE_SIZE, WINDOW_SHMID};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::rc::Rc;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

/// Handles the messages of one session.
pub struct Handler {
    core: Rc<RefCell<Core>>,
    id: SessionId,
}

fn refuse(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn unsupported<T>() -> Result<T> {
    Err(refuse("the message belongs to a feature that was not negotiated"))
}

fn region(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        user_addr: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl Handler {
    /// The handler of a session of the core.
    pub fn new(core: Rc<RefCell<Core>>, id: SessionId) -> Handler {
        Handler { core, id }
    }

    fn with<T>(
        &self,
        act: impl FnOnce(&mut Core) -> std::result::Result<T, crate::core::Refusal>,
    ) -> Result<T> {
        act(&mut self.core.borrow_mut()).map_err(refuse)
    }

    /// Puts another memory table in place of the one that there is.
    fn change_memory(
        &self,
        change: impl FnOnce(&DeviceMemory) -> std::result::Result<DeviceMemory, crate::memory::MemoryError>,
    ) -> Result<()> {
        self.with(|core| {
            let port = core.session(self.id)?.port.clone();
            let memory = change(&port.memory.read())?;
            port.memory.replace(memory);
            Ok(())
        })
    }
}

impl VhostUserBackendReqHandler for Handler {
    fn set_owner(&self) -> Result<()> {
        self.with(|core| {
            core.session_mut(self.id)?.owned = true;
            Ok(())
        })
    }

    fn reset_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        self.with(|core| core.reset_device(self.id))
    }

    fn get_features(&self) -> Result<u64> {
        self.with(|core| Ok(core.session(self.id)?.offered()))
    }

    fn set_features(&self, features: u64) -> Result<()> {
        self.with(|core| core.set_features(self.id, features))
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions: Vec<_> = regions.iter().map(region).zip(files).collect();
        self.change_memory(|_| DeviceMemory::from_regions(regions.into_iter()))?;
        Ok(None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE);
        let size = size.ok_or_else(|| refuse(format!("a queue of {num} descriptors is not possible")))?;
        self.with(|core| {
            core.idle_ring(self.id, index)?.size = size;
            core.update_rings(self.id)
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.with(|core| {
            core.idle_ring(self.id, index)?.addresses = Some((descriptor, used, available));
            core.update_rings(self.id)
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.with(|core| {
            core.idle_ring(self.id, index)?.base = base as u16;
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let base = self.with(|core| core.stop_ring(self.id, index))?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.with(|core| core.set_kick(self.id, index.into(), fd))
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.with(|core| core.set_call(self.id, index.into(), fd))
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.with(|core| core.set_err(self.id, index.into(), fd))
    }

    fn get_protocol_features(&self) -> Result<Protocol> {
        self.with(|core| {
            let session = core.session_mut(self.id)?;
            session.hasty |= !session.owned;
            Ok(session.offered_protocol())
        })
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.with(|core| {
            let accepted = Protocol::from_bits(features).filter(|f| PROTOCOL_FEATURES.contains(*f));
            core.session_mut(self.id)?.protocol = accepted.ok_or(crate::core::Refusal::Features(features))?;
            Ok(())
        })
    }

    fn get_queue_num(&self) -> Result<u64> {
        self.with(|core| Ok(core.session(self.id)?.rings.len() as u64))
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.with(|core| core.enable_ring(self.id, index, enable))
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.with(|core| core.config(self.id, offset as usize, size as usize))
    }

    fn set_config(&self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // Writes are ignored.
        Ok(())
    }

    fn set_gpu_socket(&self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(crate::memory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &self,
        added: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_memory(|memory| memory.with(region(added), fd))?;
        Ok(None)
    }

    fn remove_mem_region(&self, removed: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_memory(|memory| memory.without(region(removed)))
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        self.with(|core| {
            let mut sizes = [0; WINDOW_SHMID as usize + 1];
            sizes[usize::from(WINDOW_SHMID)] = core.session(self.id)?.limits.window_size;
            Ok(VhostUserShMemConfig::new(1, &sizes))
        })
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
