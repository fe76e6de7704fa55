package ublk

import (
	"encoding/binary"
	"fmt"
)

// Numbers and structures of the kernel's interface. Everything in this file is
// from include/uapi/linux/ublk_cmd.h (Linux 6.1 to 7.2) unless another header is
// named.

// Sizes of the structures that commands carry.
const (
	sizeofCtrlCmd = 32 // struct ublksrv_ctrl_cmd
	sizeofIOCmd   = 16 // struct ublksrv_io_cmd
	sizeofIODesc  = 24 // struct ublksrv_io_desc
	sizeofDevInfo = 64 // struct ublksrv_ctrl_dev_info
	sizeofBatchIO = 16 // struct ublk_batch_io

	sizeofElemHeader = 8                    // struct ublk_elem_header
	sizeofElement    = sizeofElemHeader + 8 // and the buffer's address
)

// Ioctl numbers are built from a direction, the size of the argument, the
// driver's letter 'u' and the command's number (_IOR and _IOWR of
// include/uapi/asm-generic/ioctl.h, which amd64, arm64 and riscv64 share).
const (
	ioctlWrite = 1 << 30 // _IOC_WRITE
	ioctlRead  = 2 << 30 // _IOC_READ
	ioctlType  = 'u' << 8

	ctrlR  = ioctlRead | sizeofCtrlCmd<<16 | ioctlType
	ctrlWR = ioctlRead | ioctlWrite | sizeofCtrlCmd<<16 | ioctlType
	ioWR   = ioctlRead | ioctlWrite | sizeofIOCmd<<16 | ioctlType
	batWR  = ioctlRead | ioctlWrite | sizeofBatchIO<<16 | ioctlType
)

// command is the number of a command.
type command uint32

// Control commands, UBLK_U_CMD_*.
const (
	cmdGetDevInfo        command = ctrlR | 0x02
	cmdAddDev            command = ctrlWR | 0x04
	cmdDelDev            command = ctrlWR | 0x05
	cmdStartDev          command = ctrlWR | 0x06
	cmdStopDev           command = ctrlWR | 0x07
	cmdSetParams         command = ctrlWR | 0x08
	cmdGetParams         command = ctrlR | 0x09
	cmdStartUserRecovery command = ctrlWR | 0x10
	cmdEndUserRecovery   command = ctrlWR | 0x11
	cmdGetDevInfo2       command = ctrlR | 0x12
	cmdGetFeatures       command = ctrlR | 0x13
	cmdDelDevAsync       command = ctrlR | 0x14
	cmdUpdateSize        command = ctrlWR | 0x15
	cmdTryStopDev        command = ctrlWR | 0x17
)

// I/O commands, UBLK_U_IO_*.
const (
	ioFetchReq          command = ioWR | 0x20
	ioCommitAndFetchReq command = ioWR | 0x21
	ioPrepIOCmds        command = batWR | 0x25
	ioCommitIOCmds      command = batWR | 0x26
	ioFetchIOCmds       command = batWR | 0x27
)

// legacy returns the number that kernels before 6.4 know the command by: the
// ioctl number without its direction, size and type.
func (c command) legacy() command { return c & 0xff }

// String returns the control command's name in the header, without UBLK_U_CMD_.
func (c command) String() string {
	switch c {
	case cmdGetDevInfo:
		return "GET_DEV_INFO"
	case cmdAddDev:
		return "ADD_DEV"
	case cmdDelDev:
		return "DEL_DEV"
	case cmdStartDev:
		return "START_DEV"
	case cmdStopDev:
		return "STOP_DEV"
	case cmdSetParams:
		return "SET_PARAMS"
	case cmdGetParams:
		return "GET_PARAMS"
	case cmdStartUserRecovery:
		return "START_USER_RECOVERY"
	case cmdEndUserRecovery:
		return "END_USER_RECOVERY"
	case cmdGetDevInfo2:
		return "GET_DEV_INFO2"
	case cmdGetFeatures:
		return "GET_FEATURES"
	case cmdDelDevAsync:
		return "DEL_DEV_ASYNC"
	case cmdUpdateSize:
		return "UPDATE_SIZE"
	case cmdTryStopDev:
		return "TRY_STOP_DEV"
	}
	return fmt.Sprintf("command %#x", uint32(c))
}

// ctrlCmd is struct ublksrv_ctrl_cmd.
type ctrlCmd struct {
	DevID      uint32
	QueueID    uint16 // noQueue where the command is for the device
	Len        uint16 // of the buffer at Addr
	Addr       uint64
	Data       uint64
	DevPathLen uint16
	Pad        uint16
	Reserved   uint32
}

const (
	noQueue = ^uint16(0)
	anyID   = ^uint32(0)
)

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	Queues      uint16
	Depth       uint16
	State       uint16
	_           uint16
	MaxIOBytes  uint32
	DevID       uint32
	ServerPID   int32
	_           uint32
	Flags       uint64
	ServerFlags uint64
	OwnerUID    uint32
	OwnerGID    uint32
	_, _        uint64
}

// paramsABI is the part of struct ublk_params that is used here. The structure
// has grown since and says its length, so a prefix is all right in both
// directions.
type paramsABI struct {
	Len   uint32
	Types uint32

	// struct ublk_param_basic
	Attrs             uint32
	LogicalShift      uint8
	PhysicalShift     uint8
	IOOptShift        uint8
	IOMinShift        uint8
	MaxSectors        uint32
	ChunkSectors      uint32
	DevSectors        uint64
	VirtBoundaryMask  uint64
	DiscardAlignment  uint32 // struct ublk_param_discard
	DiscardGranule    uint32
	MaxDiscardSectors uint32
	MaxZeroesSectors  uint32
	MaxDiscardSegs    uint16
	_                 uint16
}

const sizeofParams = 60

// batchIO returns struct ublk_batch_io: a command for n elements of a queue.
func batchIO(queue uint16, flags batchFlags, n, elemBytes int) (b [sizeofBatchIO]byte) {
	binary.NativeEndian.PutUint16(b[0:], queue)
	binary.NativeEndian.PutUint16(b[2:], uint16(flags))
	binary.NativeEndian.PutUint16(b[4:], uint16(n))
	b[6] = uint8(elemBytes)
	return b
}

// batchFlags are UBLK_BATCH_F_*.
type batchFlags uint16

const batchHasBufAddr batchFlags = 1 << 1 // elements have a buffer's address

const (
	paramBasic   = 1 << 0 // UBLK_PARAM_TYPE_BASIC
	paramDiscard = 1 << 1 // UBLK_PARAM_TYPE_DISCARD

	attrReadOnly      = 1 << 0 // UBLK_ATTR_READ_ONLY
	attrVolatileCache = 1 << 2 // UBLK_ATTR_VOLATILE_CACHE
	attrFUA           = 1 << 3 // UBLK_ATTR_FUA
)

const (
	maxQueueDepth = 4096 // UBLK_MAX_QUEUE_DEPTH
	maxQueues     = 4096 // UBLK_MAX_NR_QUEUES
	maxIOBytes    = 32 << 20

	featuresLen = 8 // UBLK_FEATURES_LEN

	cmdBufOffset = 0 // UBLKSRV_CMD_BUF_OFFSET: where the descriptors are mapped
)
